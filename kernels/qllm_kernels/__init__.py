"""Operations on key/value blocks: arrays in, arrays out. Knows no model and no framework."""
