package dev.unisono.batch;

import dev.unisono.batchfile.BatchReader;
import dev.unisono.v1.BatchInferenceGrpc;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import java.io.FileDescriptor;
import java.io.FileInputStream;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.PrintStream;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.concurrent.TimeUnit;
import sun.misc.Signal;

/**
 * unisono-batch runs a file of requests as one batch, and writes each result as a line of JSON when it is there.
 *
 * <pre>unisono-batch [--target HOST:PORT] [--model NAME] [--resume BATCH_ID [--after SEQUENCE]] FILE|-</pre>
 */
public final class Main {
  private static final int ALL_COMPLETED = 0;
  /** Or were refused, or could not be read. */
  private static final int SOME_FAILED = 1;

  private static final int WRONG_USAGE = 2;
  /** No service, or none any more. */
  private static final int LOST = 3;

  private static final int INTERRUPTED = 130;

  /** A service whose machine vanished is noticed in half a minute; it permits a ping every ten seconds. */
  private static final int PING_AFTER_S = 20;

  private static final int PING_TIMEOUT_S = 10;

  private Main() {}

  /** Ends with one of the codes above. */
  public static void main(String[] words) throws InterruptedException {
    System.setErr(new PrintStream(new FileOutputStream(FileDescriptor.err), true, StandardCharsets.UTF_8));
    System.exit(run(List.of(words)));
  }

  private static int run(List<String> words) throws InterruptedException {
    if (words.contains("--help") || words.contains("-h")) {
      System.out.println(Arguments.USAGE);
      return ALL_COMPLETED;
    }
    try {
      Arguments arguments = Arguments.parse(words);
      try (InputStream source = open(arguments.file())) {
        return run(arguments, source);
      }
    } catch (Arguments.UsageException e) {
      tell(e.getMessage() + "\n" + Arguments.USAGE);
    } catch (IOException e) {
      tell(e.getMessage());
    }
    return WRONG_USAGE;
  }

  private static InputStream open(String file) throws IOException {
    return file.equals("-") ? System.in : new FileInputStream(file);
  }

  private static int run(Arguments arguments, InputStream source) throws InterruptedException {
    BatchTrace trace;
    ManagedChannel channel;
    try {
      trace = BatchTrace.start();
      // For TLS: io.grpc.TlsChannelCredentials.create().
      channel =
          Grpc.newChannelBuilder(arguments.target(), InsecureChannelCredentials.create())
              .keepAliveTime(PING_AFTER_S, TimeUnit.SECONDS)
              .keepAliveTimeout(PING_TIMEOUT_S, TimeUnit.SECONDS)
              .intercept(trace.asMetadata())
              .build();
    } catch (RuntimeException e) {
      tell(e.getMessage()); // a target or a collector that cannot be one
      return WRONG_USAGE;
    }
    System.err.println("trace " + trace.id());
    Session session =
        new Session(
            BatchInferenceGrpc.newStub(channel),
            arguments,
            new BatchReader(source),
            // Not System.out, which keeps its failures to itself.
            new FileOutputStream(FileDescriptor.out));
    listenForInterrupts(session);
    Exception problem = session.run();
    int code = conclude(session, arguments, problem);
    trace.end(session.batchId(), problem);
    channel.shutdownNow();
    return code;
  }

  /**
   * Makes the first Ctrl-C cancel the batch, and the second end the program at once.
   *
   * <p>Java's own way, a hook that runs when the program ends, cannot go on with the batch, nor hear a second one.
   */
  private static void listenForInterrupts(Session session) {
    Signal.handle(
        new Signal("INT"),
        signal -> {
          // Each signal has a thread of its own: the second may be here before the first has spoken.
          if (!session.interrupt()) {
            Runtime.getRuntime().halt(INTERRUPTED);
          }
          System.err.println("cancelling the batch; once more ends at once");
        });
  }

  /** Says how it went, and gives the exit code. */
  private static int conclude(Session session, Arguments arguments, Exception problem) {
    int code = session.hasAllCompleted() ? ALL_COMPLETED : SOME_FAILED;
    if (problem instanceof NoItemsException) {
      tell(arguments.file() + " " + problem.getMessage());
      return WRONG_USAGE;
    } else if (problem instanceof RefusedException) {
      tell("the service refused: " + problem.getMessage());
      code = SOME_FAILED;
    } else if (problem != null && session.batchId().isEmpty()) {
      tell("no service at " + arguments.target() + ": " + problem.getMessage());
      return LOST;
    } else if (problem != null) {
      tell("the connection was lost: " + problem.getMessage());
      System.err.println("To go on where it ended:\n  " + session.resumeCommand());
      code = LOST;
    } else if (!session.cutShort().isEmpty() && !session.isInterrupted()) {
      // Somebody else cancelled it, say; there may be lines that it never took.
      tell("the batch ended before its time: " + session.cutShort());
      code = SOME_FAILED;
    }
    System.err.println(session.tally());
    return session.isInterrupted() ? INTERRUPTED : code;
  }

  private static void tell(String what) {
    System.err.println("unisono-batch: " + what);
  }

  /** What gRPC says of a failure, and what it was caused by. */
  static String inWords(Throwable error) {
    Status status = Status.fromThrowable(error);
    String words = status.getCode() + (status.getDescription() == null ? "" : ": " + status.getDescription());
    Throwable cause = status.getCause();
    return cause == null || cause.getMessage() == null ? words : words + " (" + cause.getMessage() + ")";
  }
}
