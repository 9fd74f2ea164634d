//! Bytes as the table of a backup.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| farmem_memserver::fuzzing::backup_table(input));
