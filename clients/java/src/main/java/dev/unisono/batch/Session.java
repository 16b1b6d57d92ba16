package dev.unisono.batch;

import dev.unisono.batchfile.BatchReader;
import dev.unisono.batchfile.LineException;
import dev.unisono.v1.AddItems;
import dev.unisono.v1.BatchConfig;
import dev.unisono.v1.BatchEvent;
import dev.unisono.v1.BatchInferenceGrpc.BatchInferenceStub;
import dev.unisono.v1.BatchState;
import dev.unisono.v1.CancelBatchRequest;
import dev.unisono.v1.CancelBatchResponse;
import dev.unisono.v1.CancelItems;
import dev.unisono.v1.GetServerInfoRequest;
import dev.unisono.v1.GetServerInfoResponse;
import dev.unisono.v1.Item;
import dev.unisono.v1.ItemAcknowledged;
import dev.unisono.v1.OnDisconnect;
import dev.unisono.v1.Progress;
import dev.unisono.v1.ReopenBatch;
import dev.unisono.v1.StreamBatchOpen;
import dev.unisono.v1.StreamBatchRequest;
import dev.unisono.v1.StreamBatchResponse;
import dev.unisono.v1.ValidationMode;
import io.grpc.Status;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.ClientCallStreamObserver;
import io.grpc.stub.ClientResponseObserver;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.io.OutputStream;
import java.util.ArrayDeque;
import java.util.HashMap;
import java.util.Map;
import java.util.Optional;
import java.util.Queue;
import java.util.concurrent.TimeUnit;

/**
 * One StreamBatch call.
 *
 * <p>Three threads share it. The feeder reads lines. The writer, which is {@link #run} itself and alone sends, takes
 * them as far as the credit goes, and as long as gRPC has room for more ({@code isReady}); it half-closes when there
 * are no more, and afterwards waits to cancel. gRPC's own thread writes results as they come: it is given the next
 * message when the last one was written, so that a slow reader of the output holds up the service, and fills no memory.
 * What they share is guarded by the session's monitor; every change wakes all who wait.
 */
final class Session implements ClientResponseObserver<StreamBatchRequest, StreamBatchResponse> {
  /** Of one message. A single item may be larger. */
  private static final int MAX_ITEMS = 100;

  private static final int MAX_BYTES = 1 << 20;
  private static final long PROGRESS_EVERY_MS = 2000;
  private static final long CANCEL_TIMEOUT_S = 10;

  private final BatchInferenceStub stub;
  private final Arguments arguments;
  private final BatchReader lines;
  private final OutputStream out;
  private ClientCallStreamObserver<StreamBatchRequest> call;

  // The receiving thread's own, until the stream has ended.

  /** The last event that was taken whole: a batch that is resumed goes on after it. */
  private long sequence;
  /** Parts of the result that comes next. */
  private final StringBuilder parts = new StringBuilder();
  /** How the batch ended; unspecified until that was heard. */
  private BatchState end = BatchState.BATCH_STATE_UNSPECIFIED;

  // Guarded by the monitor.

  /** Empty until it is known. */
  private String batchId = "";
  /** Lines that were read and not yet sent. */
  private final Queue<Item> items = new ArrayDeque<>();
  private boolean isFileRead;
  /** Items that may be sent in all, and those that were, refused ones not counted. */
  private long credit;
  private long sent;
  /** The most items that a batch may have, as far as that was asked and answered. */
  private long mostItems = Long.MAX_VALUE;
  private boolean hasAsked;
  private boolean isInterrupted;
  private boolean isOver;
  /** Why the stream ended; null where the batch did. */
  private Exception problem;
  /** Results by state, and refused items. */
  private final Map<String, Integer> count = new HashMap<>();
  private int unreadable;
  private Progress progress = Progress.getDefaultInstance();

  Session(BatchInferenceStub stub, Arguments arguments, BatchReader lines, OutputStream out) {
    this.stub = stub;
    this.arguments = arguments;
    this.lines = lines;
    this.out = out;
    this.sequence = arguments.after();
  }

  /**
   * Returns null after the batch's end; a {@link NoItemsException}; a {@link RefusedException}; or what ended the
   * connection.
   */
  Exception run() throws InterruptedException {
    if (!arguments.resume().isEmpty()) {
      accept(arguments.resume());
    }
    start("feeder", this::feed);
    if (arguments.resume().isEmpty() && !awaitItem()) {
      return isInterrupted() ? null : new NoItemsException();
    }
    stub.streamBatch(this);
    start("progress", this::tellProgress);
    send(StreamBatchRequest.newBuilder().setOpen(open()).build());
    writeItems();
    close();
    cancelLater();
    synchronized (this) {
      while (!isOver) {
        wait();
      }
      return problem;
    }
  }

  /** Cancels the batch; its items' ends are still read. False where that was asked for before. */
  synchronized boolean interrupt() {
    boolean isFirst = !isInterrupted;
    isInterrupted = true;
    notifyAll();
    return isFirst;
  }

  synchronized boolean isInterrupted() {
    return isInterrupted;
  }

  synchronized String batchId() {
    return batchId;
  }

  /** How the batch was ended before its time, once the stream has ended; empty where it was not. */
  String cutShort() {
    return end == BatchState.BATCH_STATE_COMPLETED ? "" : end.name().replace("BATCH_STATE_", "");
  }

  /** The command that goes on with the batch. */
  String resumeCommand() {
    return arguments.resumeCommand(batchId(), sequence);
  }

  // -- Out ------------------------------------------------------------------------------------------------------

  /** A thread that keeps no one from ending the program: standard input may never end. */
  private static void start(String name, Runnable what) {
    Thread thread = new Thread(what, name);
    thread.setDaemon(true);
    thread.start();
  }

  /** Reads items to the end of the file; what cannot be read is told and counted. */
  private void feed() {
    boolean isMore = true;
    while (isMore) {
      try {
        Optional<Item> item = lines.next();
        isMore = item.isPresent() && offer(item.get());
      } catch (LineException e) {
        tellUnreadable(e);
      } catch (IOException e) {
        tellUnreadable(e); // the file itself cannot be read any further
        isMore = false;
      } catch (InterruptedException e) {
        isMore = false;
      }
    }
    synchronized (this) {
      isFileRead = true;
      notifyAll();
    }
  }

  /** Hands an item over once there is room; false where no more are wanted. */
  private synchronized boolean offer(Item item) throws InterruptedException {
    while (items.size() >= MAX_ITEMS && !isOver) {
      wait();
    }
    items.add(item);
    notifyAll();
    return !isOver;
  }

  private void tellUnreadable(Exception e) {
    System.err.println(arguments.file() + ": " + e.getMessage());
    change(() -> unreadable++);
  }

  /** Waits for the first item; false where there is none, or when interrupted. */
  private synchronized boolean awaitItem() throws InterruptedException {
    while (items.isEmpty() && !isFileRead && !isInterrupted) {
      wait();
    }
    return !items.isEmpty();
  }

  private StreamBatchOpen open() {
    StreamBatchOpen.Builder open = StreamBatchOpen.newBuilder();
    if (!arguments.resume().isEmpty()) {
      return open.setReopen(
              ReopenBatch.newBuilder().setBatchId(arguments.resume()).setAfterSequence(arguments.after()))
          .build();
    }
    return open.setConfig(
            BatchConfig.newBuilder()
                .setModel(arguments.model())
                // A malformed item costs itself, and not those that happen to be in the same message.
                .setValidation(ValidationMode.VALIDATION_MODE_PER_ITEM)
                // So that there is something to resume.
                .setOnDisconnect(OnDisconnect.ON_DISCONNECT_DETACH))
        .build();
  }

  /** Where the stream has ended, nothing is sent, and whoever reads it hears why. */
  private synchronized void send(StreamBatchRequest message) {
    if (!isOver) {
      call.onNext(message);
    }
  }

  /** Returns after the last item, or when interrupted, or when the stream has ended. */
  private synchronized void writeItems() throws InterruptedException {
    while (true) {
      while (!isOver && !isInterrupted && !isAllSent() && !canSend()) {
        if (isCreditUsedUp() && !items.isEmpty()) {
          askMostItems();
        }
        wait();
      }
      if (isOver || isInterrupted || isAllSent()) {
        return;
      }
      AddItems.Builder add = AddItems.newBuilder();
      int size = 0;
      for (long room = room(); room > 0 && !items.isEmpty(); room--) {
        size += items.peek().getSerializedSize();
        add.addItems(items.remove());
        if (add.getItemsCount() == MAX_ITEMS || size >= MAX_BYTES) {
          break;
        }
      }
      sent += add.getItemsCount();
      notifyAll();
      send(StreamBatchRequest.newBuilder().setAddItems(add).build());
    }
  }

  private boolean isAllSent() {
    return isFileRead && items.isEmpty();
  }

  private boolean canSend() {
    return call.isReady() && !items.isEmpty() && room() > 0;
  }

  /**
   * How many more items may be sent.
   *
   * <p>Items that wait for nothing but a release cannot use up the credit for good: without another word they are
   * released when they have waited for 50 ms, and items that end bring new credit. Only a batch that is as large as a
   * batch may be gets no more, and the service refuses the rest, each with its reason. How large that is, the service
   * is asked: that all items have ended cannot be seen here where some did so before the batch was resumed.
   */
  private long room() {
    return isCreditUsedUp() && credit >= mostItems ? MAX_ITEMS : Math.max(credit - sent, 0);
  }

  private boolean isCreditUsedUp() {
    return sent > 0 && sent >= credit;
  }

  /** Asks for the most items that a batch may have, once; the answer wakes the writer. */
  private void askMostItems() {
    if (!hasAsked) {
      hasAsked = true;
      stub.getServerInfo(GetServerInfoRequest.getDefaultInstance(), new LimitsAnswer());
    }
  }

  /** Half-closes, which also releases what was added; when interrupted, cancels all of it first. */
  private synchronized void close() {
    if (isOver) {
      return;
    }
    if (isInterrupted) {
      send(StreamBatchRequest.newBuilder().setCancelItems(CancelItems.getDefaultInstance()).build());
    }
    call.onCompleted();
  }

  /** Once nothing more can be said on the stream, the batch is cancelled by its name. */
  private void cancelLater() throws InterruptedException {
    synchronized (this) {
      if (isInterrupted) {
        return; // on the stream
      }
      while (!isOver && !(isInterrupted && !batchId.isEmpty())) {
        wait();
      }
      if (isOver) {
        return;
      }
    }
    CancelBatchRequest cancel = CancelBatchRequest.newBuilder().setBatchId(batchId()).build();
    stub.withDeadlineAfter(CANCEL_TIMEOUT_S, TimeUnit.SECONDS).cancelBatch(cancel, new CancelAnswer());
  }

  /** What became of a cancel; the items' own ends come on the stream. */
  private static final class CancelAnswer implements StreamObserver<CancelBatchResponse> {
    @Override
    public void onNext(CancelBatchResponse answer) {}

    @Override
    public void onError(Throwable error) {
      System.err.println("unisono-batch: cancelling: " + Main.inWords(error));
    }

    @Override
    public void onCompleted() {}
  }

  /** What the service says of its limits. */
  private final class LimitsAnswer implements StreamObserver<GetServerInfoResponse> {
    @Override
    public void onNext(GetServerInfoResponse answer) {
      long most = Integer.toUnsignedLong(answer.getLimits().getMaxItems());
      if (most > 0) {
        change(() -> mostItems = most);
      }
    }

    @Override
    public void onError(Throwable error) {
      System.err.println("unisono-batch: asking for the service's limits: " + Main.inWords(error));
    }

    @Override
    public void onCompleted() {}
  }

  // -- In -------------------------------------------------------------------------------------------------------

  @Override
  public void beforeStart(ClientCallStreamObserver<StreamBatchRequest> started) {
    call = started;
    call.setOnReadyHandler(
        () -> {
          synchronized (this) {
            notifyAll();
          }
        });
  }

  @Override
  public void onNext(StreamBatchResponse message) {
    try {
      switch (message.getMessageCase()) {
        case CREDIT -> change(() -> credit = Math.max(credit, message.getCredit().getTotalItems()));
        case ITEMS_ACKNOWLEDGED -> {
          for (ItemAcknowledged item : message.getItemsAcknowledged().getItemsList()) {
            if (item.hasRefusal()) {
              change(() -> sent--);
              put(ResultLine.ofRefusal(item));
            }
          }
        }
        case EVENT -> hear(message.getEvent());
        case MESSAGE_NOT_SET -> { } // a newer service may say more
      }
    } catch (IOException e) {
      // Nobody reads what is written: the rest can still be had.
      over(new IOException("the output cannot be written: " + e.getMessage(), e));
      call.cancel("the output cannot be written", e);
    }
  }

  @Override
  public void onError(Throwable error) {
    Problem found = Problem.of(StatusProto.fromThrowable(error));
    boolean isRefused = !found.reason().isEmpty() && found.code() != Status.Code.UNAVAILABLE.value();
    over(isRefused ? new RefusedException(found) : new IOException(Main.inWords(error)));
  }

  @Override
  public void onCompleted() {
    boolean hasEnded = end != BatchState.BATCH_STATE_UNSPECIFIED;
    over(hasEnded ? null : new IOException("the stream ended before the batch"));
  }

  private void hear(BatchEvent event) throws IOException {
    switch (event.getEventCase()) {
      case ACCEPTED -> {
        if (batchId().isEmpty()) {
          accept(event.getAccepted().getBatchId());
        }
      }
      case RESULT_PART -> {
        parts.append(event.getResultPart().getContent());
        return; // its sequence counts when the result is whole
      }
      case RESULT -> {
        put(ResultLine.of(event.getResult(), parts.toString()));
        parts.setLength(0);
      }
      case PROGRESS -> change(() -> progress = event.getProgress());
      case SUMMARY -> end = event.getSummary().getState();
      default -> { }
    }
    if (event.hasSequence()) {
      sequence = event.getSequence();
    }
  }

  private void accept(String id) {
    System.err.println("batch " + id);
    change(() -> batchId = id);
  }

  private void put(ResultLine line) throws IOException {
    change(() -> count.merge(line.state(), 1, Integer::sum));
    line.writeTo(out);
  }

  private synchronized void over(Exception why) {
    if (!isOver) {
      isOver = true;
      problem = why;
      notifyAll();
    }
  }

  /** Changes what others look at, and wakes them. */
  private synchronized void change(Runnable how) {
    how.run();
    notifyAll();
  }

  // -- What is told ---------------------------------------------------------------------------------------------

  private void tellProgress() {
    try {
      while (true) {
        Thread.sleep(PROGRESS_EVERY_MS);
        String words;
        synchronized (this) {
          if (isOver) {
            return;
          }
          words =
              String.format("%s; %d running, %d waiting", tally(), progress.getInFlight(), progress.getQueued());
        }
        System.err.println("progress: " + words);
      }
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }

  synchronized String tally() {
    return String.format(
        "%d completed, %d failed, %d cancelled, %d expired, %d refused, %d unreadable",
        counted(ResultLine.COMPLETED), counted("FAILED"), counted("CANCELLED"), counted("EXPIRED"),
        counted(ResultLine.REFUSED), unreadable);
  }

  private int counted(String state) {
    return count.getOrDefault(state, 0);
  }

  synchronized boolean hasAllCompleted() {
    int all = count.values().stream().mapToInt(Integer::intValue).sum();
    return unreadable == 0 && all == counted(ResultLine.COMPLETED);
  }
}
