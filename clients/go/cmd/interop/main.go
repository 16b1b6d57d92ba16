// interop runs gRPC's own interoperability cases, as far as they apply to this service, each by its usual name.
//
//	interop --target HOST:PORT CASE…
//	interop --list
//
// A line "CASE ok" or "CASE: what is wrong" is written for each; the exit code is 1 where one failed. The service
// must stand over a backend that obeys the prompts below; tests/clients/ has it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	pb "github.com/unisono/unisono/clients/go/gen/unisono/v1"
)

const (
	maxReceive = 32 << 20
	maxSend    = 4 << 20
	limit      = 20 * time.Second
	// What the backend is asked to do.
	short   = "[[tokens=2]]"
	endless = "[[tokens=4000]]"
	big     = "a big answer" // more than a message may hold
	broken  = "a special error"
	// Characters of one to four bytes, and what would end a header.
	special = "test with whitespace\t\r\nand é, Unicode BMP ☺ and non-BMP 😈"
	// The rate that the service permits, and how long a caller keeps to it here: four pings.
	pingEvery = 10 * time.Second
	pingFor   = 43 * time.Second
)

type caller struct {
	target string
	client pb.BatchInferenceClient
	on     *grpc.ClientConn
}

var cases = map[string]func(context.Context, *caller) error{
	"empty_unary":                 emptyUnary,
	"large_unary":                 largeUnary,
	"message_too_large":           messageTooLarge,
	"client_compressed_unary":     clientCompressedUnary,
	"client_streaming":            clientStreaming,
	"server_streaming":            serverStreaming,
	"large_response":              largeResponse,
	"ping_pong":                   pingPong,
	"empty_stream":                emptyStream,
	"cancel_after_begin":          cancelAfterBegin,
	"cancel_after_first_response": cancelAfterFirstResponse,
	"timeout_on_sleeping_server":  timeoutOnSleepingServer,
	"status_code_and_message":     statusCodeAndMessage,
	"special_status_message":      specialStatusMessage,
	"unimplemented_method":        unimplementedMethod,
	"unimplemented_service":       unimplementedService,
	"keepalive":                   keepAlive,
}

func main() {
	target := flag.String("target", "127.0.0.1:50051", "where the service listens")
	isList := flag.Bool("list", false, "write the names of all cases")
	flag.Parse()
	if *isList {
		for _, name := range slices.Sorted(maps.Keys(cases)) {
			fmt.Println(name)
		}
		return
	}
	failed := false
	for _, name := range flag.Args() {
		if err := runCase(*target, name); err != nil {
			failed = true
			fmt.Printf("%s: %v\n", name, err)
		} else {
			fmt.Printf("%s ok\n", name)
		}
	}
	if failed {
		os.Exit(1)
	}
}

func runCase(target, name string) error {
	run, isKnown := cases[name]
	if !isKnown {
		return errors.New("no such case")
	}
	connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	ctx, cancel := context.WithTimeout(context.Background(), limit+pingFor)
	defer cancel()
	return run(ctx, &caller{target: target, client: pb.NewBatchInferenceClient(connection), on: connection})
}

// -- Requests and answers ----------------------------------------------------------------------------------------

func item(id, prompt string) *pb.Item {
	message := &pb.Message{Role: pb.Role_ROLE_USER, Content: prompt}
	chat := &pb.Item_Chat{Chat: &pb.ChatRequest{Messages: []*pb.Message{message}}}
	return &pb.Item{ItemId: id, Request: chat}
}

func config() *pb.BatchConfig { return &pb.BatchConfig{Model: "fake"} }

func (c *caller) open(ctx context.Context, one *pb.BatchConfig) (pb.BatchInference_StreamBatchClient, error) {
	stream, err := c.client.StreamBatch(ctx)
	if err != nil {
		return nil, err
	}
	open := &pb.StreamBatchOpen{Batch: &pb.StreamBatchOpen_Config{Config: one}}
	return stream, stream.Send(&pb.StreamBatchRequest{Message: &pb.StreamBatchRequest_Open{Open: open}})
}

func add(stream pb.BatchInference_StreamBatchClient, items ...*pb.Item) error {
	return stream.Send(&pb.StreamBatchRequest{
		Message: &pb.StreamBatchRequest_AddItems{AddItems: &pb.AddItems{Items: items}},
	})
}

// events reads to the end; `each` may end it before, with an error of its own.
func events(receive func() (*pb.BatchEvent, error), each func(*pb.BatchEvent) error) error {
	for {
		event, err := receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if event == nil {
			continue
		}
		if err := each(event); err != nil {
			return err
		}
	}
}

func ofStream(stream pb.BatchInference_StreamBatchClient) func() (*pb.BatchEvent, error) {
	return func() (*pb.BatchEvent, error) {
		message, err := stream.Recv()
		return message.GetEvent(), err
	}
}

func (c *caller) runBatch(ctx context.Context, each func(*pb.BatchEvent) error, items ...*pb.Item) error {
	stream, err := c.client.RunBatch(ctx, &pb.RunBatchRequest{Config: config(), Items: items})
	if err != nil {
		return err
	}
	return events(func() (*pb.BatchEvent, error) {
		message, err := stream.Recv()
		return message.GetEvent(), err
	}, each)
}

// seen counts what an end is made of.
type seen struct {
	completed int
	state     pb.BatchState
}

func (s *seen) add(event *pb.BatchEvent) error {
	if event.GetResult().GetState() == pb.ItemState_ITEM_STATE_COMPLETED {
		s.completed++
	}
	if event.GetSummary() != nil {
		s.state = event.GetSummary().State
	}
	return nil
}

func (s *seen) check(completed int, state pb.BatchState) error {
	if s.completed != completed || s.state != state {
		return fmt.Errorf("%d completed and %v, not %d and %v", s.completed, s.state, completed, state)
	}
	return nil
}

func expect(err error, want codes.Code) error {
	if got := status.Code(err); got != want {
		return fmt.Errorf("%v (%v), not %v", got, err, want)
	}
	return nil
}

func reasonOf(details []any) string {
	for _, detail := range details {
		if info, isInfo := detail.(*errdetails.ErrorInfo); isInfo {
			return info.Reason
		}
	}
	return ""
}

// -- Unary calls -------------------------------------------------------------------------------------------------

func emptyUnary(ctx context.Context, c *caller) error {
	info, err := c.client.GetServerInfo(ctx, &pb.GetServerInfoRequest{})
	if err == nil && info.GetLimits().GetMaxReceiveBytes() != maxReceive {
		return fmt.Errorf("limits %v", info.Limits)
	}
	return err
}

// plan is a request of about so many bytes.
func plan(size int) *pb.PlanBatchRequest {
	request := &pb.PlanBatchRequest{Config: config()}
	const each = 2 << 20
	for n := 0; n < size/each; n++ {
		request.Items = append(request.Items, item(fmt.Sprint(n), strings.Repeat("x", each-100)))
	}
	return request
}

func largeUnary(ctx context.Context, c *caller) error {
	request := plan(maxReceive)
	if size := proto.Size(request); size < maxReceive*99/100 || size > maxReceive {
		return fmt.Errorf("the request has %d bytes", size)
	}
	answer, err := c.client.PlanBatch(ctx, request)
	if err == nil && len(answer.Groups)+len(answer.Refusals) == 0 {
		return errors.New("an empty plan")
	}
	return err
}

func messageTooLarge(ctx context.Context, c *caller) error {
	_, err := c.client.PlanBatch(ctx, plan(maxReceive+4<<20))
	if err := expect(err, codes.ResourceExhausted); err != nil {
		return err
	}
	// The connection is as good as before.
	return emptyUnary(ctx, c)
}

func clientCompressedUnary(ctx context.Context, c *caller) error {
	_, err := c.client.PlanBatch(ctx, plan(4<<20), grpc.UseCompressor(gzip.Name))
	return err
}

// -- Streams -----------------------------------------------------------------------------------------------------

// clientStreaming: messages of their own, then a half-close, which alone releases them.
func clientStreaming(ctx context.Context, c *caller) error {
	one := config()
	size := uint32(1000)
	one.Release = &pb.ReleasePolicy{Size: &size}
	stream, err := c.open(ctx, one)
	for n := 0; n < 4 && err == nil; n++ {
		err = add(stream, item(fmt.Sprint(n), short))
	}
	if err == nil {
		err = stream.CloseSend()
	}
	if err != nil {
		return err
	}
	var got seen
	if err := events(ofStream(stream), got.add); err != nil {
		return err
	}
	return got.check(4, pb.BatchState_BATCH_STATE_COMPLETED)
}

func serverStreaming(ctx context.Context, c *caller) error {
	var got seen
	if err := c.runBatch(ctx, got.add, item("a", short), item("b", short)); err != nil {
		return err
	}
	return got.check(2, pb.BatchState_BATCH_STATE_COMPLETED)
}

func largeResponse(ctx context.Context, c *caller) error {
	size, parts := 0, 0
	err := c.runBatch(ctx, func(event *pb.BatchEvent) error {
		size += len(event.GetResultPart().GetContent()) + len(event.GetResult().GetCompletion().GetContent())
		if event.GetResultPart() != nil {
			parts++
		}
		if bytes := proto.Size(event); bytes > maxSend {
			return fmt.Errorf("a message of %d bytes", bytes)
		}
		return nil
	}, item("a", big))
	if err == nil && (size <= maxSend || parts == 0) {
		return fmt.Errorf("%d bytes in %d parts", size, parts)
	}
	return err
}

func pingPong(ctx context.Context, c *caller) error {
	stream, err := c.open(ctx, config())
	if err != nil {
		return err
	}
	var got seen
	sent := 0
	next := func() error {
		if sent == 4 {
			return stream.CloseSend()
		}
		sent++
		return add(stream, item(fmt.Sprint(sent), short))
	}
	if err := next(); err != nil {
		return err
	}
	err = events(ofStream(stream), func(event *pb.BatchEvent) error {
		_ = got.add(event)
		if event.GetResult() != nil {
			return next()
		}
		return nil
	})
	if err != nil {
		return err
	}
	return got.check(4, pb.BatchState_BATCH_STATE_COMPLETED)
}

// emptyStream: a batch without items ends; a stream without any message has no batch.
func emptyStream(ctx context.Context, c *caller) error {
	stream, err := c.open(ctx, config())
	if err != nil {
		return err
	}
	_ = stream.CloseSend()
	var got seen
	if err := events(ofStream(stream), got.add); err != nil {
		return err
	}
	if err := got.check(0, pb.BatchState_BATCH_STATE_COMPLETED); err != nil {
		return err
	}
	silent, err := c.client.StreamBatch(ctx)
	if err != nil {
		return err
	}
	_ = silent.CloseSend()
	_, err = silent.Recv()
	return expect(err, codes.InvalidArgument)
}

// -- Ends --------------------------------------------------------------------------------------------------------

func cancelAfterBegin(ctx context.Context, c *caller) error {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.client.StreamBatch(inner)
	if err != nil {
		return err
	}
	cancel()
	_, err = stream.Recv()
	if err := expect(err, codes.Canceled); err != nil {
		return err
	}
	return emptyUnary(ctx, c)
}

// cancelAfterFirstResponse: the caller hears CANCELLED, and the batch is cancelled.
func cancelAfterFirstResponse(ctx context.Context, c *caller) error {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	batchID := ""
	err := c.runBatch(inner, func(event *pb.BatchEvent) error {
		batchID = event.GetAccepted().GetBatchId()
		cancel()
		return nil
	}, item("a", endless))
	if err := expect(err, codes.Canceled); err != nil {
		return err
	}
	stream, err := c.client.AttachBatch(ctx, &pb.AttachBatchRequest{BatchId: batchID})
	if err != nil {
		return err
	}
	var got seen
	err = events(func() (*pb.BatchEvent, error) {
		message, err := stream.Recv()
		return message.GetEvent(), err
	}, got.add)
	if err != nil {
		return err
	}
	return got.check(0, pb.BatchState_BATCH_STATE_CANCELLED)
}

// timeoutOnSleepingServer: a deadline that is over at once is DEADLINE_EXCEEDED; one with some room is the batch's
// own, and the end is still heard.
func timeoutOnSleepingServer(ctx context.Context, c *caller) error {
	brief, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	stream, err := c.client.StreamBatch(brief)
	if err == nil {
		_, err = stream.Recv()
	}
	if err := expect(err, codes.DeadlineExceeded); err != nil {
		return err
	}
	second, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var got seen
	err = c.runBatch(second, got.add, item("a", endless))
	if err != nil {
		return err
	}
	return got.check(0, pb.BatchState_BATCH_STATE_EXPIRED)
}

func statusCodeAndMessage(ctx context.Context, c *caller) error {
	_, err := c.client.CancelBatch(ctx, &pb.CancelBatchRequest{BatchId: "nosuch"})
	if err := expect(err, codes.NotFound); err != nil {
		return err
	}
	got := status.Convert(err)
	if !strings.Contains(got.Message(), "nosuch") || reasonOf(got.Details()) != "BATCH_NOT_FOUND" {
		return fmt.Errorf("%q with %v", got.Message(), got.Details())
	}
	return nil
}

// specialStatusMessage: what a caller wrote comes back in a status, its line breaks as escapes; what a backend said
// comes back in an item's error as it was.
func specialStatusMessage(ctx context.Context, c *caller) error {
	_, err := c.client.ListModels(ctx, &pb.ListModelsRequest{Backend: special})
	if err := expect(err, codes.InvalidArgument); err != nil {
		return err
	}
	quoted := strings.NewReplacer("\t", `\t`, "\n", `\n`, "\r", `\r`).Replace(special)
	if message := status.Convert(err).Message(); !strings.Contains(message, quoted) {
		return fmt.Errorf("%q does not hold %q", message, quoted)
	}
	said := ""
	err = c.runBatch(ctx, func(event *pb.BatchEvent) error {
		said += event.GetResult().GetError().GetMessage()
		return nil
	}, item("a", broken))
	if err == nil && !strings.Contains(said, special) {
		return fmt.Errorf("%q does not hold %q", said, special)
	}
	return err
}

func unimplementedMethod(ctx context.Context, c *caller) error {
	err := c.on.Invoke(ctx, "/unisono.v1.BatchInference/NoSuchMethod", &emptypb.Empty{}, &emptypb.Empty{})
	return expect(err, codes.Unimplemented)
}

func unimplementedService(ctx context.Context, c *caller) error {
	err := c.on.Invoke(ctx, "/unisono.v1.NoSuchService/GetServerInfo", &emptypb.Empty{}, &emptypb.Empty{})
	return expect(err, codes.Unimplemented)
}

// keepAlive: pings at the permitted rate, without any call, do not cost the connection.
func keepAlive(ctx context.Context, c *caller) error {
	connection, err := grpc.NewClient(c.target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: limit, PermitWithoutStream: true}))
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	if err := emptyUnary(ctx, &caller{client: pb.NewBatchInferenceClient(connection)}); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, pingFor)
	defer cancel()
	if connection.WaitForStateChange(ctx, connectivity.Ready) {
		return fmt.Errorf("the connection is %v", connection.GetState())
	}
	return nil
}
