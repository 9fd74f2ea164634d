//! Prints how many microseconds a fault takes on this machine at the least: a thread touches pages that
//! are not there, and a handler on the same processor copies a page in, with nothing to look up, fetch
//! or move out. With the round trip to a server it is what a fault on far memory cannot fall below.

#![expect(unsafe_code, reason = "touches memory that is not there, and lowers its own priority")]
#![expect(clippy::print_stdout, reason = "what it prints is what it is for")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use farmem_vmem::{AddressRange, Area, Event, Features, Uffd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

const PAGE_BYTES: usize = 4096;
/// 64 MiB: the time of one fault varies, their mean hardly.
const PAGES: usize = 16 << 10;
/// What the handler copies in.
static PAGE: [u8; PAGE_BYTES] = [1; PAGE_BYTES];

fn main() {
    let area = Area::new(PAGES * PAGE_BYTES).expect("memory");
    let uffd = Uffd::new(Features::FaultsOnly).expect("a userfaultfd");
    uffd.register(area.range()).expect("registering");
    let mut here = CpuSet::new();
    here.set(sched_getcpu());
    sched_setaffinity(None, &here).expect("a processor");
    let is_done = AtomicBool::new(false);
    let time = thread::scope(|scope| {
        scope.spawn(|| handle(&uffd, &is_done));
        let began = Instant::now();
        for at in 0..PAGES {
            let address = (area.range().start() + at * PAGE_BYTES) as *const u8;
            // SAFETY: the area is mapped and lives until the end; the handler fills the page.
            let byte = unsafe { address.read_volatile() };
            assert_eq!(byte, 1, "the page that was copied in");
        }
        let time = began.elapsed();
        is_done.store(true, Ordering::Relaxed);
        time
    });
    println!("{:.2}", time.as_secs_f64() * 1e6 / PAGES as f64);
}

/// Answers faults until `is_done`, as a pager that yields does: whom it wakes runs before it.
fn handle(uffd: &Uffd, is_done: &AtomicBool) {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: sched_setscheduler(2) reads the parameter and changes the calling thread's scheduling.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameter) };
    let mut events = Vec::new();
    while !is_done.load(Ordering::Relaxed) {
        events.clear();
        if uffd.read_events(&mut events).expect("events") == 0 {
            let some_time = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let _ = poll(&mut [PollFd::new(&uffd.as_fd(), PollFlags::IN)], Some(&some_time));
        }
        for event in &events {
            let Event::Fault { address, .. } = event else { continue };
            let _ = uffd.copy_static(AddressRange::pages_from(*address, 1), &PAGE);
        }
    }
}
