//! Sees that a pager that yields its processor is not starved.
//!
//! A pager that serves threads that fault fast lets every other task run before it (`Anchor` of
//! farmem-vmem says why). It has a turn every few microseconds then. When it had only a few in a
//! whole period, it starves behind somebody who computes, or there is not much to do: either way it
//! gets its priority back.

use std::time::Duration;

use farmem_pager::OwnMemory;
use farmem_vmem::{Lifeline, be_real_time};

use crate::runtime;

/// No fault waits for a starved pager for longer than two of these. A look costs some microseconds.
const PERIOD: Duration = Duration::from_millis(2);
/// Fewer turns in a period and the pager is on time again: one every 100 us.
const TURNS_MIN: u64 = 20;
/// Periods without a yielding pager after which the warden sleeps until it is woken.
const QUIET_PERIODS_MAX: u32 = 50;
const STACK_BYTES: usize = 64 << 10;

/// Lets the pager, which is the calling thread, yield. Without real-time priority, or without a
/// thread to watch it, it does not.
pub(crate) fn watch(memory: &mut OwnMemory) {
    let Some(lifeline) = memory.yield_from_now_on() else { return };
    // The pager yields only once the lifeline has its holder.
    let _ = runtime::spawn("farmem-warden", STACK_BYTES, move || {
        be_real_time();
        lifeline.hold();
        guard(&lifeline)
    });
}

fn guard(lifeline: &Lifeline) -> ! {
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
                lifeline.rescue();
            }
        }
        std::thread::park();
    }
}
