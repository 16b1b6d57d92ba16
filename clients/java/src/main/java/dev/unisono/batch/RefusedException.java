package dev.unisono.batch;

/** The service ended the stream with a reason of its own: trying again changes nothing. */
final class RefusedException extends Exception {
  private static final long serialVersionUID = 1L;

  RefusedException(Problem problem) {
    super(problem.reason() + ": " + problem.message());
  }
}
