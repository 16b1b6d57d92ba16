// Package batchfile reads batch files: JSON lines, each of which becomes an item of a batch.
//
// Three forms of line are read, and each field that is not known is refused by its name:
//
//	{"id": …, "prompt": …, "options": {…}}
//	{"id": …, "messages": [{"role": …, "content": …}], "options": {…}}
//	{"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {"messages": …, "max_tokens": …}}
package batchfile

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode"
	"unicode/utf8"

	pb "github.com/unisono/unisono/clients/go/gen/unisono/v1"
)

const (
	// Longer lines cannot become an item that the service takes.
	maxLineBytes = 16 << 20
	maxIDBytes   = 256
)

// LineError says why a line is no item. The lines after it can still be read.
type LineError struct {
	// The line's number, from 1.
	Line int
	// What is wrong, beginning with the field's path.
	Problem string
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %s", e.Line, e.Problem) }

// Reader gives the items of a batch file.
type Reader struct {
	source *bufio.Reader
	number int
	// The line of each id that was given.
	lineOf map[string]int
}

// NewReader reads from source, no further than it has to.
func NewReader(source io.Reader) *Reader {
	return &Reader{source: bufio.NewReaderSize(source, 64<<10), lineOf: map[string]int{}}
}

// Next returns the next item; a *LineError where a line is none, io.EOF at the end, and what reading failed with.
func (r *Reader) Next() (*pb.Item, error) {
	for {
		line, isTooLong, err := r.readLine()
		if err != nil {
			return nil, err
		}
		r.number++
		if isTooLong {
			return nil, &LineError{r.number, fmt.Sprintf("is longer than %d bytes", maxLineBytes)}
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		item, problem := r.readItem(line)
		if problem != nil {
			return nil, &LineError{r.number, problem.Error()}
		}
		return item, nil
	}
}

// readLine returns a line, of which no more is kept than may be long.
func (r *Reader) readLine() (line []byte, isTooLong bool, err error) {
	for {
		piece, err := r.source.ReadSlice('\n')
		if isTooLong = isTooLong || len(line)+len(piece) > maxLineBytes; !isTooLong {
			line = append(line, piece...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && (len(line) > 0 || isTooLong):
			return line, isTooLong, nil
		default:
			return line, isTooLong, err
		}
	}
}

func (r *Reader) readItem(line []byte) (*pb.Item, error) {
	if !utf8.Valid(line) {
		return nil, errors.New("is not UTF-8")
	}
	f, err := parse(line)
	if err != nil {
		return nil, err
	}
	id := r.takeID(f)
	item := itemOf(f)
	f.end()
	if f.problem() != nil {
		return nil, f.problem()
	}
	item.ItemId = id
	// Only ids of items that are sent are taken: a line that was refused keeps no other from using its id.
	r.lineOf[id] = r.number
	return item, nil
}

// takeID returns the line's id, or the one that its number makes.
func (r *Reader) takeID(f *fields) string {
	id := ""
	for _, name := range []string{"id", "item_id", "custom_id"} {
		if !f.has(name) {
			continue
		}
		if id != "" {
			f.refuse(name, "says again what another id says")
		}
		id = f.id(name)
	}
	if id == "" {
		id = fmt.Sprintf("line-%d", r.number)
	}
	if former, isTaken := r.lineOf[id]; isTaken {
		f.refuse("", fmt.Sprintf("%q is the id of line %d already", id, former))
	}
	return id
}

// id takes a text, or a whole number as its digits.
func (f *fields) id(name string) string {
	var number int64
	if raw := f.left[name]; json.Unmarshal(raw, &number) == nil {
		f.take(name)
		return fmt.Sprint(number)
	}
	id := f.text(name)
	switch {
	case id == "":
		f.refuse(name, "is empty; leave it out to have the line's number for an id")
	case len(id) > maxIDBytes:
		f.refuse(name, fmt.Sprintf("is longer than %d bytes", maxIDBytes))
	case bytes.ContainsFunc([]byte(id), unicode.IsControl):
		f.refuse(name, "must not hold control characters")
	}
	return id
}
