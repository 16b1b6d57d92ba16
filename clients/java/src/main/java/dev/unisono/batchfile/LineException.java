package dev.unisono.batchfile;

/** Says why a line is no item. The lines after it can still be read. */
public final class LineException extends Exception {
  private static final long serialVersionUID = 1L;

  private final int line;

  LineException(int line, String problem) {
    super(problem);
    this.line = line;
  }

  /** The line's number, from 1. */
  public int line() {
    return line;
  }

  /** What is wrong, beginning with the field's path. */
  public String problem() {
    return super.getMessage();
  }

  @Override
  public String getMessage() {
    return "line " + line + ": " + problem();
  }
}
