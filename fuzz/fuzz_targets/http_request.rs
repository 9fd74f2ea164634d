//! Bytes as a request to the port for metrics.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| farmem_memserver::fuzzing::http_request(input));
