//! Sees that a pager that yields its processor is not starved.
//!
//! A pager that serves threads that fault fast lets every other task run before it (`Anchor` of
//! farmem-vmem says why). It has a turn every few microseconds then. When it had only a few in a
//! whole period, there is not much to do, or it starves behind somebody who computes: either way it
//! gets its priority back.

use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use farmem_pager::OwnMemory;
use farmem_vmem::{Lifeline, be_real_time};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

use crate::runtime;

/// No fault waits for a starved pager for longer than two of these. A look costs some microseconds.
const PERIOD: Duration = Duration::from_millis(2);
/// Fewer turns in a period and the pager is on time again: one every 100 us.
const TURNS_MIN: u64 = 20;
/// A turn that moves a whole window out takes less.
const TURN_MAX: Duration = Duration::from_micros(300);
/// Periods without a yielding pager after which the warden sleeps until it is woken.
const QUIET_PERIODS_MAX: u32 = 50;
const STACK_BYTES: usize = 64 << 10;

/// Lets the pager, which is the calling thread, yield. Without real-time priority, or without a
/// thread to watch it, it does not.
/// `epoll` is what it waits for when there is nothing to do.
pub(crate) fn watch(memory: &mut OwnMemory, epoll: RawFd) {
    let Some(lifeline) = memory.yield_from_now_on() else { return };
    // The pager yields only once the lifeline has its holder.
    let _ = runtime::spawn("farmem-warden", STACK_BYTES, move || {
        be_real_time();
        lifeline.hold();
        guard(&lifeline, epoll)
    });
}

fn guard(lifeline: &Lifeline, epoll: RawFd) -> ! {
    loop {
        let mut turns = lifeline.turns();
        let mut quiet = 0;
        while quiet < QUIET_PERIODS_MAX {
            std::thread::sleep(PERIOD);
            let before = std::mem::replace(&mut turns, lifeline.turns());
            if !lifeline.yields() {
                quiet += 1;
                continue;
            }
            quiet = 0;
            if turns - before < TURNS_MIN {
                lifeline.rescue(starves(lifeline, epoll));
            }
        }
        std::thread::park();
    }
}

/// Whether the pager has something to do and is not let do it. One that waited for its server has few
/// turns, too, and one that has just gone on has something to do.
fn starves(lifeline: &Lifeline, epoll: RawFd) -> bool {
    let turns = lifeline.turns();
    if !is_ready(epoll) {
        return false;
    }
    std::thread::sleep(TURN_MAX);
    lifeline.turns() == turns && is_ready(epoll)
}

/// Whether there is something to do that the pager waits for.
fn is_ready(epoll: RawFd) -> bool {
    // SAFETY: the pager keeps it open as long as this process lives.
    let epoll = unsafe { BorrowedFd::borrow_raw(epoll) };
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&epoll, PollFlags::IN)], Some(&at_once)).is_ok_and(|ready| ready > 0)
}
