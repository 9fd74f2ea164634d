//! Core dumps: the kernel serves no fault of a process that dumps, so what is out may be absent from
//! the core. What is there is right.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};

use crate::rig::{LIMIT, Outcome, Rig, skipped};

const PAGE: u64 = 4096;
/// As in `programs/trap.h`.
const PAGES: u64 = (128 << 20) / PAGE;

/// R6: a program that dumps its core ends, by its own signal.
/// R1: each page of the core is what the program stored there, or a hole of the file.
#[test]
fn u23_a_core_holds_right_pages_or_none() {
    let Some(rig) = Rig::new() else { return };
    let outcome = rig.run(&["--local", LIMIT], &rig.compile("abort"), &[]);
    assert_eq!(outcome.status.signal(), Some(6), "{outcome:?}");
    outcome.has_paged();
    let Some(file) = core_in(&rig.path("")) else { return };
    let core = File::open(file).unwrap();
    let start = place_of(&core, address_in(&outcome));
    let (mut present, mut absent) = (0, 0);
    for page in 0..PAGES {
        let at = start + page * PAGE;
        // The kernel passes over what it cannot read, which leaves a hole.
        if seek(&core, SeekFrom::Data(at)).is_ok_and(|data| data == at) {
            let mut content = [0; PAGE as usize];
            core.read_exact_at(&mut content, at).unwrap();
            let word = |index: usize| {
                u64::from_le_bytes(content[index * 8..index * 8 + 8].try_into().unwrap())
            };
            let stamp = 1 ^ page.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            assert_eq!((word(0), word(100), word(511)), (stamp, page, !stamp), "page {page}");
            present += 1;
        } else {
            absent += 1;
        }
    }
    // A quarter of the memory was here, less what the pager needs; the rest was out.
    assert!(present > PAGES / 16 && absent > PAGES / 2, "{present} present, {absent} absent");
}

/// The core, where this machine writes cores into the folder of the program.
fn core_in(folder: &Path) -> Option<PathBuf> {
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    if pattern.starts_with(['|', '/']) {
        return skipped(&format!("cores go elsewhere: {}", pattern.trim_end()));
    }
    let files = folder.read_dir().unwrap().map(|entry| entry.unwrap());
    let mut cores = files.filter(|entry| entry.file_name().to_string_lossy().starts_with("core"));
    Some(cores.next().expect("no core").path())
}

fn address_in(outcome: &Outcome) -> u64 {
    outcome.stdout.trim_end().strip_prefix("filled ").unwrap().parse().unwrap()
}

/// Where in the core the memory at `address` is, by its program headers.
fn place_of(core: &File, address: u64) -> u64 {
    const LOAD: u64 = 1;
    let number = |at: u64, length: usize| {
        let mut bytes = [0; 8];
        core.read_exact_at(&mut bytes[..length], at).unwrap();
        u64::from_le_bytes(bytes)
    };
    let (first, length, mut count) = (number(32, 8), number(54, 2), number(56, 2));
    if count == 0xFFFF {
        // More than fit: the first section header has the number.
        count = number(number(40, 8) + 44, 4);
    }
    for header in (0..count).map(|index| first + index * length) {
        let (offset, start) = (number(header + 8, 8), number(header + 16, 8));
        let (in_file, in_memory) = (number(header + 32, 8), number(header + 40, 8));
        if number(header, 4) == LOAD && (start..start + in_memory).contains(&address) {
            assert_eq!(in_file, in_memory, "the memory is not in the core");
            return offset + (address - start);
        }
    }
    panic!("no part of the core has {address:x}");
}
