"""The deciding part: pure values and machines, without input, output, clock or chance."""
