//! What kind of executable a file is: whether the dynamic loader, and so the preload library, will
//! be in it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What a file begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Executable {
    /// An ELF file of this machine that names a dynamic loader.
    Dynamic,
    /// An ELF file of this machine that names none.
    Static,
    /// An ELF file of another machine or word size.
    Foreign,
    /// A script that names its interpreter.
    Script(PathBuf),
    /// Anything else. A shell would take it for a script of its own.
    Other,
}

const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// More program headers than any linker makes; a larger count is a broken file.
const PROGRAM_HEADERS_MAX: u16 = 512;
const PT_INTERP: u32 = 3;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE: u16 = if cfg!(target_arch = "x86_64") { 62 } else { 183 };

/// The kernel reads no more of a script's first line.
const SCRIPT_LINE_BYTES: u64 = 255;

impl Executable {
    /// Looks at the file's head.
    ///
    /// # Errors
    /// What reading says.
    pub(crate) fn inspect(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut head = Vec::new();
        file.by_ref().take(SCRIPT_LINE_BYTES).read_to_end(&mut head)?;
        if let Some(line) = head.strip_prefix(b"#!") {
            let line = line.split(|&byte| byte == b'\n').next().unwrap_or(line);
            let interpreter = line.trim_ascii().split(u8::is_ascii_whitespace).next();
            let interpreter = OsStr::from_bytes(interpreter.unwrap_or(line));
            return Ok(Self::Script(PathBuf::from(interpreter)));
        }
        if !head.starts_with(b"\x7fELF") || head.len() < ELF_HEADER_BYTES {
            return Ok(Self::Other);
        }
        if head[4] != CLASS_64 || head[5] != LITTLE_ENDIAN || u16_at(&head, 18) != MACHINE {
            return Ok(Self::Foreign);
        }
        has_interpreter(&file, &head)
            .map(|dynamic| if dynamic { Self::Dynamic } else { Self::Static })
    }
}

fn has_interpreter(file: &File, head: &[u8]) -> io::Result<bool> {
    let table = u64_at(head, 32);
    let count = u16_at(head, 56).min(PROGRAM_HEADERS_MAX);
    let mut header = [0; PROGRAM_HEADER_BYTES];
    for index in 0..count {
        let offset = u64::from(index) * PROGRAM_HEADER_BYTES as u64;
        file.read_exact_at(&mut header, table.saturating_add(offset))?;
        if u32_at(&header, 0) == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn inspect(content: &[u8]) -> Executable {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        Executable::inspect(file.path()).unwrap()
    }

    #[test]
    fn programs_and_scripts_are_told_apart() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(Executable::inspect(&own).unwrap(), Executable::Dynamic);
        for (line, interpreter) in [
            ("#!/bin/sh\necho\n", "/bin/sh"),
            ("#! /usr/bin/env python3 -u\n", "/usr/bin/env"),
            ("#!/bin/sh", "/bin/sh"),
        ] {
            let script = Executable::Script(PathBuf::from(interpreter));
            assert_eq!(inspect(line.as_bytes()), script);
        }
        assert_eq!(inspect(b""), Executable::Other);
        assert_eq!(inspect(b"\x7fELF"), Executable::Other);
        assert_eq!(inspect(b"echo hello\n"), Executable::Other);
    }

    #[test]
    fn static_foreign_and_broken_files() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let mut headless = own[..4096].to_vec();
        headless[56..58].fill(0);
        assert_eq!(inspect(&headless), Executable::Static);
        let mut foreign = headless.clone();
        foreign[18] = 8;
        assert_eq!(inspect(&foreign), Executable::Foreign);
        let mut broken = headless.clone();
        broken[56] = 1;
        broken[32..40].fill(0xff);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&broken).unwrap();
        assert!(Executable::inspect(file.path()).is_err());
    }
}
