package dev.unisono.batch;

import java.util.ArrayList;
import java.util.Iterator;
import java.util.List;
import java.util.regex.Pattern;
import java.util.stream.Collectors;

/**
 * What the program was asked to do.
 *
 * @param target where the service listens
 * @param hasTarget whether it was given as an argument, and so must be given again
 * @param model the model of items that name none; empty for the service's own
 * @param resume the batch to go on with; empty for a new one
 * @param after with {@code resume}: the results up to this sequence are there already
 * @param file the batch file; {@code -} for standard input
 */
record Arguments(String target, boolean hasTarget, String model, String resume, long after, String file) {
  static final String USAGE =
      """
      usage: unisono-batch [--target HOST:PORT] [--model NAME] [--resume BATCH_ID [--after SEQUENCE]] FILE|-
        --target HOST:PORT   where the service listens; UNISONO_TARGET says it too (127.0.0.1:50051)
        --model NAME         the model of items that name none
        --resume BATCH_ID    go on with this batch
        --after SEQUENCE     with --resume: the results up to this sequence are there already""";

  private static final String DEFAULT_TARGET = "127.0.0.1:50051";
  /** What a shell takes as it stands. */
  private static final Pattern PLAIN = Pattern.compile("[-\\w./:=@%+,]+");

  /** They are wrong; the message says how. */
  static final class UsageException extends Exception {
    private static final long serialVersionUID = 1L;

    UsageException(String message) {
      super(message);
    }
  }

  static Arguments parse(List<String> words) throws UsageException {
    String fromEnvironment = System.getenv("UNISONO_TARGET");
    boolean hasTarget = false;
    String target = fromEnvironment == null || fromEnvironment.isEmpty() ? DEFAULT_TARGET : fromEnvironment;
    String model = "";
    String resume = "";
    String after = "";
    List<String> files = new ArrayList<>();
    for (Iterator<String> rest = words.iterator(); rest.hasNext(); ) {
      String word = rest.next();
      if (!word.startsWith("-") || word.equals("-")) {
        files.add(word);
        continue;
      }
      if (word.equals("--")) {
        rest.forEachRemaining(files::add);
        break;
      }
      String[] parts = word.split("=", 2);
      switch (parts[0]) {
        case "--target" -> {
          target = valueOf(parts, rest);
          hasTarget = true;
        }
        case "--model" -> model = valueOf(parts, rest);
        case "--resume" -> resume = valueOf(parts, rest);
        case "--after" -> after = valueOf(parts, rest);
        default -> throw new UsageException("no such option: " + parts[0]);
      }
    }
    if (files.size() != 1) {
      throw new UsageException("one FILE is needed, or - for standard input");
    }
    if (!after.isEmpty() && resume.isEmpty()) {
      throw new UsageException("--after needs --resume");
    }
    return new Arguments(target, hasTarget, model, resume, sequenceOf(after), files.get(0));
  }

  private static String valueOf(String[] parts, Iterator<String> rest) throws UsageException {
    String value = parts.length == 2 ? parts[1] : rest.hasNext() ? rest.next() : "";
    if (value.isEmpty()) {
      throw new UsageException(parts[0] + " needs a value");
    }
    return value;
  }

  private static long sequenceOf(String after) throws UsageException {
    try {
      return after.isEmpty() ? 0 : Long.parseUnsignedLong(after);
    } catch (NumberFormatException e) {
      throw new UsageException("--after must be a number, not " + after);
    }
  }

  /** The command that goes on after a sequence, as a shell takes it. */
  String resumeCommand(String batchId, long sequence) {
    List<String> words = new ArrayList<>(List.of("unisono-batch"));
    if (hasTarget) {
      words.addAll(List.of("--target", target));
    }
    words.addAll(List.of("--resume", batchId, "--after", Long.toUnsignedString(sequence)));
    if (file.startsWith("-") && !file.equals("-")) {
      words.add("--");
    }
    words.add(file);
    return words.stream()
        .map(word -> PLAIN.matcher(word).matches() ? word : "'" + word.replace("'", "'\\''") + "'")
        .collect(Collectors.joining(" "));
  }
}
