// unisono-batch runs a file of requests as one batch, and writes each result as a line of JSON when it is there.
//
//	unisono-batch [--target HOST:PORT] [--model NAME] [--resume BATCH_ID [--after SEQUENCE]] FILE|-
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "github.com/unisono/unisono/clients/go/gen/unisono/v1"
	"github.com/unisono/unisono/clients/go/internal/batchfile"
)

// Exit codes.
const (
	allCompleted = 0
	someFailed   = 1 // or were refused, or could not be read
	wrongUsage   = 2
	lost         = 3 // no service, or none any more
	interrupted  = 130
)

const (
	defaultTarget = "127.0.0.1:50051"
	// A service whose machine vanished is noticed in half a minute; it permits a ping every ten seconds.
	pingAfter, pingTimeout = 20 * time.Second, 10 * time.Second
)

type options struct {
	target, model, resume, file string
	after                       uint64
	// Whether the target was given as an argument, and so must be given again.
	hasTarget bool
}

func main() {
	log.SetFlags(0)
	os.Exit(run(parseArguments(os.Args[1:])))
}

// parseArguments ends the program where they are wrong.
func parseArguments(arguments []string) options {
	var o options
	flags := flag.NewFlagSet("unisono-batch", flag.ExitOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(),
			"usage: unisono-batch [--target HOST:PORT] [--model NAME] [--resume BATCH_ID [--after SEQUENCE]] FILE|-")
		flags.PrintDefaults()
	}
	target := os.Getenv("UNISONO_TARGET")
	if target == "" {
		target = defaultTarget
	}
	flags.StringVar(&o.target, "target", target, "where the service listens; UNISONO_TARGET says it too")
	flags.StringVar(&o.model, "model", "", "the model of items that name none")
	flags.StringVar(&o.resume, "resume", "", "go on with this batch")
	flags.Uint64Var(&o.after, "after", 0, "with --resume: the results up to this sequence are there already")
	_ = flags.Parse(arguments) // it ends the program by itself
	flags.Visit(func(f *flag.Flag) { o.hasTarget = o.hasTarget || f.Name == "target" })
	switch {
	case flags.NArg() != 1:
		flags.Usage()
		os.Exit(wrongUsage)
	case o.after > 0 && o.resume == "":
		log.Print("unisono-batch: --after needs --resume")
		os.Exit(wrongUsage)
	}
	o.file = flags.Arg(0)
	return o
}

// resumeCommand is what goes on after a sequence, as a shell takes it.
func (o options) resumeCommand(batchID string, after uint64) string {
	words := []string{"unisono-batch"}
	if o.hasTarget {
		words = append(words, "--target", o.target)
	}
	words = append(words, "--resume", batchID, "--after", fmt.Sprint(after), o.file)
	for i, word := range words {
		if strings.ContainsFunc(word, needsQuotes) {
			words[i] = "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}

func needsQuotes(c rune) bool {
	return !strings.ContainsRune("-_./:=@%+,", c) && (c < '0' || c > '9') && (c|0x20 < 'a' || c|0x20 > 'z')
}

// run does it all, and returns the exit code.
func run(o options) int {
	var source io.Reader = os.Stdin
	if o.file != "-" {
		file, err := os.Open(o.file)
		if err != nil {
			log.Printf("unisono-batch: %v", err)
			return wrongUsage
		}
		defer func() { _ = file.Close() }()
		source = file
	}
	// For TLS: credentials.NewTLS(&tls.Config{}) of google.golang.org/grpc/credentials.
	connection, err := grpc.NewClient(o.target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: pingTimeout}))
	if err != nil {
		log.Printf("unisono-batch: %v", err)
		return wrongUsage
	}
	defer func() { _ = connection.Close() }()

	ctx, trace, err := startTrace(context.Background())
	if err != nil {
		log.Printf("unisono-batch: %v", err)
		return wrongUsage
	}
	log.Printf("trace %s", trace.id)

	s := newSession(pb.NewBatchInferenceClient(connection), o, batchfile.NewReader(source), os.Stdout)
	stopListening := s.listenForInterrupts()
	err = s.run(ctx)
	stopListening()
	code := s.conclude(err)
	trace.end(s.batchID, err)
	return code
}

// listenForInterrupts makes the first Ctrl-C cancel the batch, and the second end the program at once.
func (s *session) listenForInterrupts() (stop func()) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt)
	go func() {
		<-signals
		log.Print("cancelling the batch; once more ends at once")
		close(s.interrupted)
		<-signals
		os.Exit(interrupted)
	}()
	return func() { signal.Stop(signals) }
}

func (s *session) wasInterrupted() bool {
	select {
	case <-s.interrupted:
		return true
	default:
		return false
	}
}

// conclude says how it went, and gives the exit code.
func (s *session) conclude(err error) int {
	code := allCompleted
	var no *refusedError
	switch {
	case err == nil:
		if how := s.cutShort(); how != "" && !s.wasInterrupted() {
			// Somebody else cancelled it, say; there may be lines that it never took.
			log.Printf("unisono-batch: the batch ended before its time: %s", how)
			code = someFailed
		}
	case errors.Is(err, errNoItems):
		log.Printf("unisono-batch: %s %v", s.options.file, err)
		return wrongUsage
	case errors.As(err, &no):
		log.Printf("unisono-batch: the service refused: %v", no)
		code = someFailed
	case s.batchID == "":
		log.Printf("unisono-batch: no service at %s: %v", s.options.target, err)
		return lost
	default:
		log.Printf("unisono-batch: the connection was lost: %v\nTo go on where it ended:\n  %s",
			err, s.options.resumeCommand(s.batchID, s.sequence))
		code = lost
	}
	log.Print(s.tally())
	if s.wasInterrupted() {
		return interrupted
	}
	if code == allCompleted && !s.hasAllCompleted() {
		code = someFailed
	}
	return code
}
