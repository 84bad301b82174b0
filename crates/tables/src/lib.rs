//! SQL tables as key ranges: catalogue, key codec, row codec, indexes, auto-increment, statistics, DDL steps.
