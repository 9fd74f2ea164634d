//! Bytes as a message.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| farmem_wire::fuzzing::decoder(input));
