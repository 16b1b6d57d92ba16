package dev.unisono.batch;

/** There is nothing to open a batch for. */
final class NoItemsException extends Exception {
  private static final long serialVersionUID = 1L;

  NoItemsException() {
    super("holds no items");
  }
}
