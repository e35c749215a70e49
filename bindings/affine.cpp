// filled in by the op
