//! Bytes as what three clients send to a memory server, and what happens meanwhile.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| farmem_memserver::fuzzing::peer(input));
