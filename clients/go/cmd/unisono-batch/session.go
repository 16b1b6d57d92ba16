package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/unisono/unisono/clients/go/gen/unisono/v1"
	"github.com/unisono/unisono/clients/go/internal/batchfile"
)

const (
	// Of one message. A single item may be larger.
	maxItems, maxBytes = 100, 1 << 20
	progressEvery      = 2 * time.Second
	cancelTimeout      = 10 * time.Second
)

// session is one StreamBatch call.
//
// Three goroutines share it. The feeder reads lines. The writer, which alone sends, takes them as far as the credit
// goes, and half-closes when there are no more; afterwards it waits to cancel. The reader, which is `run` itself,
// writes results as they come, and ends the others when the stream ends.
type session struct {
	client  pb.BatchInferenceClient
	options options
	lines   *batchfile.Reader
	out     io.Writer

	// Closed when the batch is to be cancelled.
	interrupted chan struct{}
	// Closed when the first item was read, or the file has none.
	looked chan struct{}
	// Closed when the batch's id is known.
	accepted chan struct{}
	// Holds one value when the credit, or what was sent, may have changed.
	changed chan struct{}

	// The reader's own.
	batchID string
	// The last event that was taken whole: a batch that is resumed goes on after it.
	sequence uint64
	// Parts of the result that comes next.
	parts string
	// How the batch ended; unspecified until that was heard.
	end pb.BatchState

	// What several goroutines look at.
	mutex sync.Mutex
	// Items that may be sent in all, and those that were, refused ones not counted.
	credit, sent uint64
	// The most items that a batch may have, as far as that was asked and answered.
	mostItems uint64
	asked     sync.Once
	// Results by state, and refused items.
	count      map[string]int
	unreadable int
	progress   *pb.Progress
}

func newSession(client pb.BatchInferenceClient, o options, lines *batchfile.Reader, out io.Writer) *session {
	return &session{
		client:      client,
		options:     o,
		lines:       lines,
		out:         out,
		interrupted: make(chan struct{}),
		looked:      make(chan struct{}),
		accepted:    make(chan struct{}),
		changed:     make(chan struct{}, 1),
		sequence:    o.after,
		mostItems:   math.MaxUint64,
		count:       map[string]int{},
	}
}

// refusedError is a status with a reason of the service's: trying again changes nothing.
type refusedError struct{ problem *problem }

func (e *refusedError) Error() string {
	return fmt.Sprintf("%s: %s", e.problem.Reason, e.problem.Message)
}

// errNoItems says that there is nothing to open a batch for.
var errNoItems = errors.New("holds no items")

// run returns nil after the batch's end; errNoItems; a *refusedError; or what ended the connection.
func (s *session) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	items := make(chan *pb.Item, maxItems)
	go s.feed(ctx, items)
	if s.options.resume == "" {
		select {
		case <-s.looked:
			if len(items) == 0 {
				return errNoItems
			}
		case <-s.interrupted:
			return nil
		}
	}
	stream, err := s.client.StreamBatch(ctx)
	if err != nil {
		return err
	}
	if s.options.resume != "" {
		s.accept(s.options.resume)
	}
	go s.write(ctx, stream, items)
	go s.tellProgress(ctx)
	for {
		message, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF) && s.end != pb.BatchState_BATCH_STATE_UNSPECIFIED:
			return nil
		case errors.Is(err, io.EOF):
			return errors.New("the stream ended before the batch")
		case err != nil:
			found := problemOf(status.Convert(err).Proto())
			if found.Reason != "" && found.Code != int32(codes.Unavailable) {
				return &refusedError{found}
			}
			return err
		}
		if err := s.hear(message); err != nil {
			return err
		}
	}
}

// -- Out ---------------------------------------------------------------------------------------------------------

// feed reads items to the end of the file; what cannot be read is told and counted.
func (s *session) feed(ctx context.Context, items chan<- *pb.Item) {
	looked := sync.OnceFunc(func() { close(s.looked) })
	defer looked()
	defer close(items)
	for {
		item, err := s.lines.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			log.Printf("%s: %v", s.options.file, err)
			s.mutex.Lock()
			s.unreadable++
			s.mutex.Unlock()
			if wrong := (*batchfile.LineError)(nil); errors.As(err, &wrong) {
				continue
			}
			return // the file itself cannot be read any further
		}
		select {
		case items <- item:
			looked()
		case <-ctx.Done():
			return
		}
	}
}

// write sends what there is to send. Where sending fails the stream has ended, and the reader hears why.
func (s *session) write(ctx context.Context, stream pb.BatchInference_StreamBatchClient, items <-chan *pb.Item) {
	if stream.Send(&pb.StreamBatchRequest{Message: &pb.StreamBatchRequest_Open{Open: s.open()}}) != nil {
		return
	}
	if s.writeItems(ctx, stream, items) != nil {
		return
	}
	select {
	case <-s.interrupted:
		cancel := &pb.StreamBatchRequest_CancelItems{CancelItems: &pb.CancelItems{}}
		_ = stream.Send(&pb.StreamBatchRequest{Message: cancel})
		_ = stream.CloseSend()
		return
	default:
		// It also releases what was added.
		_ = stream.CloseSend()
	}
	// Nothing more can be said on the stream, so that the batch is cancelled by its name.
	select {
	case <-s.interrupted:
	case <-ctx.Done():
		return
	}
	select {
	case <-s.accepted:
	case <-ctx.Done():
		return
	}
	ctx, cancel := context.WithTimeout(ctx, cancelTimeout)
	defer cancel()
	if _, err := s.client.CancelBatch(ctx, &pb.CancelBatchRequest{BatchId: s.batchID}); err != nil && ctx.Err() == nil {
		log.Printf("unisono-batch: cancelling: %v", err)
	}
}

func (s *session) open() *pb.StreamBatchOpen {
	if s.options.resume != "" {
		reopen := &pb.ReopenBatch{BatchId: s.options.resume, AfterSequence: s.options.after}
		return &pb.StreamBatchOpen{Batch: &pb.StreamBatchOpen_Reopen{Reopen: reopen}}
	}
	return &pb.StreamBatchOpen{Batch: &pb.StreamBatchOpen_Config{Config: &pb.BatchConfig{
		Model: s.options.model,
		// A malformed item costs itself, and not those that happen to be in the same message.
		Validation: pb.ValidationMode_VALIDATION_MODE_PER_ITEM,
		// So that there is something to resume.
		OnDisconnect: pb.OnDisconnect_ON_DISCONNECT_DETACH,
	}}}
}

// writeItems returns after the last item, or when interrupted.
func (s *session) writeItems(
	ctx context.Context, stream pb.BatchInference_StreamBatchClient, items <-chan *pb.Item,
) error {
	for {
		var chunk []*pb.Item
		select {
		case item, isOpen := <-items:
			if !isOpen {
				return nil
			}
			room := s.waitForCredit(ctx)
			if room == 0 {
				return nil
			}
			chunk = atHand(item, items, min(room, maxItems))
		case <-s.interrupted:
			return nil
		}
		s.mutex.Lock()
		s.sent += uint64(len(chunk))
		s.mutex.Unlock()
		add := &pb.StreamBatchRequest_AddItems{AddItems: &pb.AddItems{Items: chunk}}
		if err := stream.Send(&pb.StreamBatchRequest{Message: add}); err != nil {
			return err
		}
	}
}

// waitForCredit returns how many more items may be sent; 0 when interrupted, or when the stream has ended.
//
// Items that wait for nothing but a release cannot use up the credit for good: without another word they are released
// when they have waited for 50 ms, and items that end bring new credit. Only a batch that is as large as a batch may
// be gets no more, and the service refuses the rest, each with its reason. How large that is, the service is asked:
// that all items have ended cannot be seen here where some did so before the batch was resumed.
func (s *session) waitForCredit(ctx context.Context) uint64 {
	for {
		s.mutex.Lock()
		room := s.credit - min(s.sent, s.credit)
		isUsedUp := room == 0 && s.sent > 0
		if isUsedUp && s.credit >= s.mostItems {
			room = maxItems
		}
		s.mutex.Unlock()
		if room > 0 {
			return room
		}
		if isUsedUp {
			s.asked.Do(func() { go s.askMostItems(ctx) })
		}
		select {
		case <-s.changed:
		case <-s.interrupted:
			return 0
		case <-ctx.Done():
			return 0
		}
	}
}

// askMostItems asks for the most items that a batch may have, and wakes the writer with the answer.
func (s *session) askMostItems(ctx context.Context) {
	info, err := s.client.GetServerInfo(ctx, &pb.GetServerInfoRequest{})
	if err != nil {
		if ctx.Err() == nil {
			log.Printf("unisono-batch: asking for the service's limits: %v", err)
		}
		return
	}
	if most := info.GetLimits().GetMaxItems(); most > 0 {
		s.change(func() { s.mostItems = uint64(most) })
	}
}

// atHand gathers what can be had without waiting.
func atHand(first *pb.Item, items <-chan *pb.Item, most uint64) []*pb.Item {
	chunk, size := []*pb.Item{first}, proto.Size(first)
	for uint64(len(chunk)) < most && size < maxBytes {
		select {
		case item, isOpen := <-items:
			if !isOpen {
				return chunk
			}
			chunk, size = append(chunk, item), size+proto.Size(item)
		default:
			return chunk
		}
	}
	return chunk
}

// -- In ----------------------------------------------------------------------------------------------------------

func (s *session) accept(batchID string) {
	s.batchID = batchID
	log.Printf("batch %s", batchID)
	close(s.accepted)
}

// hear takes a message. It fails where the output cannot be written.
func (s *session) hear(message *pb.StreamBatchResponse) error {
	switch m := message.Message.(type) {
	case *pb.StreamBatchResponse_Credit:
		s.change(func() { s.credit = max(s.credit, m.Credit.TotalItems) })
	case *pb.StreamBatchResponse_ItemsAcknowledged:
		for _, item := range m.ItemsAcknowledged.Items {
			if item.Refusal == nil {
				continue
			}
			s.change(func() { s.sent-- })
			if err := s.put(&line{ID: item.ItemId, State: refused, Error: problemOf(item.Refusal)}); err != nil {
				return err
			}
		}
	case *pb.StreamBatchResponse_Event:
		return s.hearEvent(m.Event)
	}
	return nil
}

func (s *session) hearEvent(event *pb.BatchEvent) error {
	switch e := event.Event.(type) {
	case *pb.BatchEvent_Accepted:
		if s.batchID == "" {
			s.accept(e.Accepted.BatchId)
		}
	case *pb.BatchEvent_ResultPart:
		s.parts += e.ResultPart.Content
		return nil // its sequence counts when the result is whole
	case *pb.BatchEvent_Result:
		if err := s.put(lineOf(e.Result, s.parts)); err != nil {
			return err
		}
		s.parts = ""
	case *pb.BatchEvent_Progress:
		s.change(func() { s.progress = e.Progress })
	case *pb.BatchEvent_Summary:
		s.end = e.Summary.State
	}
	if event.Sequence != nil {
		s.sequence = *event.Sequence
	}
	return nil
}

func (s *session) put(l *line) error {
	s.change(func() { s.count[l.State]++ })
	return l.write(s.out)
}

// change changes what others look at, and wakes the writer.
func (s *session) change(how func()) {
	s.mutex.Lock()
	how()
	s.mutex.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// -- What is told ------------------------------------------------------------------------------------------------

func (s *session) tellProgress(ctx context.Context) {
	ticker := time.NewTicker(progressEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			s.mutex.Lock()
			running, queued := s.progress.GetInFlight(), s.progress.GetQueued()
			s.mutex.Unlock()
			log.Printf("progress: %s; %d running, %d waiting", s.tally(), running, queued)
		case <-ctx.Done():
			return
		}
	}
}

func (s *session) tally() string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return fmt.Sprintf("%d completed, %d failed, %d cancelled, %d expired, %d refused, %d unreadable",
		s.count["COMPLETED"], s.count["FAILED"], s.count["CANCELLED"], s.count["EXPIRED"], s.count[refused], s.unreadable)
}

// cutShort says how the batch was ended before its time; empty where it was not.
func (s *session) cutShort() string {
	if s.end == pb.BatchState_BATCH_STATE_COMPLETED {
		return ""
	}
	return strings.TrimPrefix(s.end.String(), "BATCH_STATE_")
}

func (s *session) hasAllCompleted() bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	others := s.unreadable
	for state, count := range s.count {
		if state != "COMPLETED" {
			others += count
		}
	}
	return others == 0
}
