//! Keeps a program that fills memory from passing its limit while its pager starts.
//!
//! A program at full speed touches some megabytes in a millisecond, and a pager needs ten or twenty of
//! them until it can move pages out. Threads that run meanwhile are held, once in the life of a
//! program: from the pager's first moment until the program is within its limit, or for
//! [`PAUSE_MAX`]. Threads that sleep are left alone: they touch nothing, and some calls that they sleep
//! in end early when they are disturbed.

use std::time::{Duration, Instant};

use farmem_vmem::Hold;

use crate::runtime::{Arguments, Sizes};

/// Nobody is held for longer: a server that is slow to take pages must not keep a program from going on
/// above its limit, as it may for as long as a fault that waits for room.
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// How often threads that have woken up meanwhile are looked for, and those that have stopped let go.
pub(crate) const LOOK_MICROS: u64 = 500;

/// A thread that has not come to stop after so many looks is inside a call of the kernel, and is not held.
const ENDING_LOOKS_MAX: u32 = 20;

/// See the module's text. Nobody is held any more once it is gone and this process too.
pub(crate) struct Pause {
    hold: Option<Hold>,
    until: Instant,
    is_over: bool,
}

impl Pause {
    /// Holds the threads of the program that run now, if it has more than half of its limit already: nobody
    /// is disturbed who has far to go.
    pub(crate) fn begin(arguments: &Arguments) -> Self {
        let sizes = Sizes::read(arguments.statm);
        let is_near =
            sizes.is_ok_and(|sizes| sizes.resident_anonymous_bytes() > arguments.limit_bytes / 2);
        let hold = is_near.then(|| {
            let mut hold = Hold::new(arguments.program);
            hold.take_running();
            hold
        });
        Self { hold, until: Instant::now() + PAUSE_MAX, is_over: false }
    }

    /// How much longer threads may be held, if some are.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.hold.as_ref().map(|_| self.until.saturating_duration_since(Instant::now()))
    }

    /// Holds nobody any more, now or as soon as those that are held have stopped.
    pub(crate) fn end(&mut self) {
        self.until = Instant::now();
        let mut looks = 0;
        while self.is_on() && looks < ENDING_LOOKS_MAX {
            self.step(false);
            looks += 1;
            std::thread::sleep(Duration::from_micros(LOOK_MICROS));
        }
    }

    /// Whether threads are held, and [`Self::step`] is to be called soon.
    pub(crate) const fn is_on(&self) -> bool {
        self.hold.is_some()
    }

    /// Goes on holding as long as the program `exceeds` its limit, within reason.
    pub(crate) fn step(&mut self, exceeds: bool) {
        let Some(hold) = &mut self.hold else { return };
        self.is_over |= !exceeds || Instant::now() >= self.until;
        if !self.is_over {
            hold.take_running();
        } else if hold.let_go() {
            self.hold = None;
        }
    }
}
