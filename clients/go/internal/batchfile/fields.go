package batchfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"sort"
)

// Escapes of a JSON text: those that are no half of a pair of surrogates, as far as they could be taken for one, and
// what begins a half.
var (
	wholeEscape = regexp.MustCompile(`\\u[dD][89abAB][[:xdigit:]]{2}\\u[dD][c-fC-F][[:xdigit:]]{2}|\\[^u]`)
	halfEscape  = regexp.MustCompile(`\\u[dD][89a-fA-F]`)
)

// fields are those of one JSON object. Each is taken by name and type; `end` refuses what nobody took, so a field
// that is not known cannot be passed over in silence. The first problem is kept, in all objects of a line together.
type fields struct {
	path  string
	left  map[string]json.RawMessage
	first *error
}

// parse reads a JSON object and nothing after it.
func parse(text []byte) (*fields, error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	var value json.RawMessage
	if err := decoder.Decode(&value); err != nil {
		return nil, fmt.Errorf("not JSON: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("not JSON: something follows the object")
	}
	// The decoder would put another character in its place.
	if halfEscape.Match(value) && halfEscape.Match(wholeEscape.ReplaceAll(value, nil)) {
		return nil, errors.New("holds half of a surrogate pair, which is not Unicode text")
	}
	f := &fields{first: new(error)}
	return f, f.open(value)
}

// open reads the members; null says nothing, so it is as good as absent.
func (f *fields) open(value json.RawMessage) error {
	if err := json.Unmarshal(value, &f.left); err != nil || f.left == nil {
		return errors.New("must be a JSON object")
	}
	for name, member := range f.left {
		if string(member) == "null" {
			delete(f.left, name)
		}
	}
	return nil
}

func (f *fields) problem() error { return *f.first }

// refuse keeps a problem, unless there is one already. An empty name stands for the object itself.
func (f *fields) refuse(name, problem string) {
	if *f.first == nil {
		*f.first = errors.New(problem)
		if path := f.at(name); path != "" {
			*f.first = fmt.Errorf("%s: %s", path, problem)
		}
	}
}

func (f *fields) at(name string) string {
	if f.path == "" || name == "" {
		return f.path + name
	}
	return f.path + "." + name
}

func (f *fields) has(name string) bool { return f.left[name] != nil }

// take takes a member out; nil where it is absent.
func (f *fields) take(name string) json.RawMessage {
	member := f.left[name]
	delete(f.left, name)
	return member
}

// text takes a text; empty where it is absent.
func (f *fields) text(name string) (value string) {
	f.into(name, &value, "must be text")
	return value
}

// flag takes a truth value; false where it is absent.
func (f *fields) flag(name string) (value bool) {
	f.into(name, &value, "must be true or false")
	return value
}

func (f *fields) into(name string, value any, problem string) {
	if member := f.take(name); member != nil && json.Unmarshal(member, value) != nil {
		f.refuse(name, problem)
	}
}

// child takes an object; one without members where it is absent or none.
func (f *fields) child(name string) *fields {
	inner := &fields{path: f.at(name), first: f.first}
	if member := f.take(name); member != nil {
		if err := inner.open(member); err != nil {
			f.refuse(name, err.Error())
		}
	}
	return inner
}

// children takes a list of objects.
func (f *fields) children(name string) []*fields {
	var members []json.RawMessage
	f.into(name, &members, "must be a list of objects")
	list := make([]*fields, len(members))
	for number, member := range members {
		list[number] = &fields{path: fmt.Sprintf("%s[%d]", f.at(name), number), first: f.first}
		if err := list[number].open(member); err != nil {
			list[number].refuse("", err.Error())
		}
	}
	return list
}

// end refuses what is left: the first by name.
func (f *fields) end() {
	for _, name := range f.names() {
		f.refuse(name, "not known here")
	}
}

func (f *fields) names() []string {
	names := make([]string, 0, len(f.left))
	for name := range f.left {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}
