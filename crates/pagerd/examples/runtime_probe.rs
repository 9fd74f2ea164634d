//! A pager that pages nothing: it exercises the runtime beside a program and reports to the control
//! socket. The tests of the preload library load it in place of `farmem-pagerd`.
//!
//! It sends a packet of text when it has started, works (allocates, formats, starts threads, reads
//! the clock) while the program goes on, and sends what it has seen after each round, until the
//! program ends. Any packet sent to it makes it panic.
#![no_main]
#![allow(
    dead_code,
    unused_imports,
    reason = "the runtime is written for farmem-pagerd, which uses all of it"
)]
#![expect(unsafe_code, reason = "the runtime's")]

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};

#[path = "../src/runtime/mod.rs"]
mod runtime;

use runtime::Arguments;

static LINK: OnceLock<OwnedFd> = OnceLock::new();

const THREADS: u64 = 4;
/// Each thread keeps its stack.
const ROUNDS: u64 = 50;

fn run(arguments: Arguments) -> ! {
    let Arguments { socket, limit_bytes, program, program_pidfd, supervisor_pidfd, .. } = arguments;
    let link = LINK.get_or_init(|| dial(&socket));
    runtime::on_panic(|message| {
        let link = LINK.get().expect("set before");
        let _ = send(link, format!("panic: {message}").as_bytes(), SendFlags::NOSIGNAL);
    });
    let start = Instant::now();
    let tell = |text: String| {
        let _ = send(link, text.as_bytes(), SendFlags::NOSIGNAL);
    };
    tell(format!("started {} limit {}", program, limit_bytes));
    for round in 1..=ROUNDS {
        tell(format!(
            "round {round} sum {} owned {} foreign {} heap {} elapsed {:?}",
            work(round),
            runtime::owned_ranges().count(),
            foreign_mappings(),
            runtime::heap_bytes(),
            start.elapsed(),
        ));
        let ends = [program_pidfd, supervisor_pidfd, link.as_fd()];
        let mut ends = ends.map(|end| PollFd::from_borrowed_fd(end, PollFlags::IN));
        let pause = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        let pause = (round < ROUNDS).then_some(&pause);
        if poll(&mut ends, pause) != Ok(0) {
            assert!(ends[2].revents().is_empty(), "as the test asked");
            break;
        }
    }
    std::process::exit(0)
}

fn dial(name: &str) -> OwnedFd {
    let open = || -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        Ok(socket)
    };
    open().expect("the test listens")
}

/// Allocates in several threads at once; the sum is the same in each round.
fn work(round: u64) -> u64 {
    let sum = Arc::new(AtomicU64::new(0));
    let left = Arc::new(AtomicU64::new(THREADS));
    for thread in 0..THREADS {
        let (sum, left) = (Arc::clone(&sum), Arc::clone(&left));
        runtime::spawn("probe", 256 << 10, move || {
            let texts: HashMap<u64, String> =
                (0..2_000).map(|key| (key, format!("{round} {thread} {key}"))).collect();
            let keys = texts.iter().filter(|(key, text)| text.ends_with(&key.to_string()));
            sum.fetch_add(keys.map(|(key, _)| key).sum(), Ordering::Relaxed);
            left.fetch_sub(1, Ordering::Release);
        })
        .expect("a thread more");
    }
    while left.load(Ordering::Acquire) > 0 {
        std::thread::yield_now();
    }
    sum.load(Ordering::Relaxed)
}

/// Writable mappings of the executables of the pager and its library that the table of owned
/// ranges does not hold: there should be none.
fn foreign_mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("the map is readable");
    let owned: Vec<_> = runtime::owned_ranges().collect();
    let ours = |line: &&str| line.contains("runtime_probe") || line.contains("farmem_preload");
    let is_owned = |line: &str| {
        let (begin, rest) = line.split_once('-').expect("a range");
        let end = rest.split_once(' ').expect("a range").0;
        let address = |text| usize::from_str_radix(text, 16).expect("hexadecimal");
        owned.iter().any(|range| range.start <= address(begin) && address(end) <= range.end)
    };
    maps.lines().filter(ours).filter(|line| !is_owned(line)).count()
}
