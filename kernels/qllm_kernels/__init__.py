"""Operations on key/value blocks: arrays in, arrays out. Has no notion of models or frameworks."""
