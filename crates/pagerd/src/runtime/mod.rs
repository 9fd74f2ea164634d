//! The ground that the pager stands on: a process that shares the memory of its program.
//!
//! `farmem-pagerd` is a static position-independent executable that is never run by exec: the
//! preload library loads it beside the program and jumps to its start. From there the C library
//! sets itself up as in any program, but on memory of its own ([`heap`]); [`start`] reads
//! [`Arguments`] and calls [`run`](fn@crate::run). What follows from the shared memory:
//!
//! - the break is the program's: nothing here may move it (`sbrk` is not even linked);
//! - memory must be known to be the pager's, or it would page itself: [`memory`];
//! - `std::thread` maps its stacks elsewhere: use [`spawn`];
//! - descriptors 0, 1 and 2 are what the watcher opened, and nobody reads a standard error: a
//!   panic is told to [`on_panic`]'s function;
//! - all signals are blocked, with default actions, SIGPIPE ignored.
//!
//! Build: `cargo rustc -p farmem-pagerd --release -- -C target-feature=+crt-static`.

mod heap;
mod memory;
mod program;
mod thread;

use std::ffi::{CStr, c_char, c_int};
use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::OnceLock;

use rustix::process::Pid;

pub(crate) use heap::heap_bytes;
pub(crate) use memory::{own, owned_ranges};
pub(crate) use program::{Sizes, has_this_memory, shares_this_memory};
pub(crate) use thread::spawn;

/// What the watcher passes on.
#[derive(Clone, Debug)]
pub(crate) struct Arguments {
    /// Abstract name of the supervisor's control socket, without the leading zero byte.
    pub(crate) socket: String,
    /// The program's local limit until the supervisor names another one.
    pub(crate) limit_bytes: u64,
    /// The process whose memory this is.
    pub(crate) program: Pid,
    /// Readable when the program has ended.
    pub(crate) program_pidfd: BorrowedFd<'static>,
    /// `/proc/self/statm`: the sizes of this memory, read from offset 0.
    pub(crate) statm: BorrowedFd<'static>,
    /// Readable when the parent of this process has ended: the supervisor, or a subreaper below it.
    pub(crate) supervisor_pidfd: BorrowedFd<'static>,
}

/// Why the arguments cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the arguments are not those of the watcher; farmem-pagerd is started by the preload library \
     of the same build, not by hand"
)]
pub(crate) struct ArgumentsError;

impl Arguments {
    /// Takes arguments apart: name, socket, limit, program, its pidfd, statm, the
    /// supervisor's pidfd, and the ranges (`begin-end`, hexadecimal) that the loader has used, which are returned beside.
    fn parse<'a>(
        arguments: impl IntoIterator<Item = &'a str>,
    ) -> Result<(Self, Vec<Range<usize>>), ArgumentsError> {
        let mut arguments = arguments.into_iter().skip(1);
        let mut next = || arguments.next().ok_or(ArgumentsError);
        let arguments_before_ranges = Self {
            socket: next()?.to_owned(),
            limit_bytes: next()?.parse().map_err(|_| ArgumentsError)?,
            program: next()?.parse().ok().and_then(Pid::from_raw).ok_or(ArgumentsError)?,
            program_pidfd: descriptor(next()?)?,
            statm: descriptor(next()?)?,
            supervisor_pidfd: descriptor(next()?)?,
        };
        let ranges = arguments.map(range).collect::<Result<_, _>>()?;
        Ok((arguments_before_ranges, ranges))
    }
}

fn descriptor(text: &str) -> Result<BorrowedFd<'static>, ArgumentsError> {
    let number: RawFd = text.parse().ok().filter(|&number| number >= 0).ok_or(ArgumentsError)?;
    // SAFETY: the watcher opened it for this process, and nobody closes it.
    Ok(unsafe { BorrowedFd::borrow_raw(number) })
}

fn range(text: &str) -> Result<Range<usize>, ArgumentsError> {
    let address = |text| usize::from_str_radix(text, 16).map_err(|_| ArgumentsError);
    let (begin, end) = text.split_once('-').ok_or(ArgumentsError)?;
    Ok(address(begin)?..address(end)?)
}

/// Called by the C library's start-up. Rust's own start-up would reopen descriptors, install
/// handlers and read the memory map for a stack that is not there.
#[cfg_attr(test, expect(dead_code, reason = "the test harness has its own"))]
#[cfg_attr(not(test), unsafe(export_name = "main"))]
extern "C" fn start(count: c_int, arguments: *const *const c_char) -> c_int {
    install_panic_hook();
    let count = usize::try_from(count).unwrap_or(0);
    // SAFETY: the loader has written `count` C strings, which stay.
    let arguments = (0..count).map(|index| unsafe { CStr::from_ptr(*arguments.add(index)) });
    let texts: Vec<&str> = arguments.map(|text| text.to_str().unwrap_or("")).collect();
    let Ok((arguments, ranges)) = Arguments::parse(texts) else {
        // Started by hand, where there is somebody to read it.
        eprintln!("farmem-pagerd: {ArgumentsError}");
        return 125;
    };
    for range in ranges {
        own(range).expect("the loader passes a few ranges, the table is empty");
    }
    crate::run(arguments)
}

static ON_PANIC: OnceLock<fn(&str)> = OnceLock::new();

/// Sets what is told of a panic, in its thread, before the process aborts. The first call counts.
pub(crate) fn on_panic(tell: fn(&str)) {
    ON_PANIC.get_or_init(|| tell);
}

fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        if let Some(tell) = ON_PANIC.get() {
            tell(&panic.to_string());
        }
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    const GOOD: [&str; 9] =
        ["farmem-pagerd", "farmem-1", "4096", "77", "0", "1", "2", "1000-3000", "7f00-8000"];

    #[test]
    fn arguments_are_read_in_the_watchers_order() {
        let (arguments, ranges) = Arguments::parse(GOOD).unwrap();
        assert_eq!(arguments.socket, "farmem-1");
        assert_eq!(arguments.limit_bytes, 4096);
        assert_eq!(arguments.program.as_raw_nonzero().get(), 77);
        let descriptors = [arguments.program_pidfd, arguments.statm, arguments.supervisor_pidfd];
        assert_eq!(descriptors.map(|fd| fd.as_raw_fd()), [0, 1, 2]);
        assert_eq!(ranges, [0x1000..0x3000, 0x7f00..0x8000]);
    }

    #[test]
    fn other_arguments_are_refused() {
        assert_eq!(Arguments::parse(["farmem-pagerd"]).unwrap_err(), ArgumentsError);
        for (place, wrong) in [(2, "much"), (3, "0"), (4, "-1"), (7, "1000"), (8, "x-y")] {
            let mut arguments = GOOD;
            arguments[place] = wrong;
            assert_eq!(Arguments::parse(arguments).unwrap_err(), ArgumentsError, "{wrong}");
        }
    }
}
