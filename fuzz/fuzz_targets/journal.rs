//! Bytes as a server's journal.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| farmem_memserver::fuzzing::journal(input));
