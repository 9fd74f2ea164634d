//! When the pager looks out for what comes next instead of sleeping: for the answer that a thread waits for,
//! and without real-time priority for the next fault too.
//!
//! A pager without it may not bring the threads that it wakes to its own processor (`Anchor` of farmem-vmem says
//! why), so each fault wakes a sleeping processor twice: the pager's, then the thread's. A pager
//! that is awake when the next fault comes spares the first of them, for a processor that is busy
//! meanwhile. So it looks out only as long as that pays: for faults that come soon after each other.

use farmem_region::Nanos;

use crate::driver::Wait;

/// How long the next fault is looked out for: a thread that is woken and touches the next page at once
/// takes half of it.
const LOOK_OUT_MICROS: u64 = 50;
/// Looking out in vain costs four successes; then the pager sleeps for a number of times.
const PATIENCE_MAX: u32 = 16;
/// How often the pager sleeps before it looks out once more: twice as often each time in vain.
const SLEEPS_MIN: u32 = 8;
const SLEEPS_MAX: u32 = 1024;

/// Whether looking out has paid lately.
#[derive(Debug)]
pub struct LookOut {
    /// It may pay at all.
    useful: bool,
    patience: u32,
    /// Sleeps until the next try, and how many there were before this one.
    sleeps_left: u32,
    sleeps: u32,
}

impl LookOut {
    /// For a pager that pulls threads to its processor, or does not. It never pays where there is only
    /// one processor: nobody could do anything meanwhile.
    #[must_use]
    pub fn new(pulls: bool) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::if_useful(!pulls && processors > 1)
    }

    pub(crate) const fn if_useful(useful: bool) -> Self {
        Self { useful, patience: PATIENCE_MAX, sleeps_left: 0, sleeps: SLEEPS_MIN }
    }

    /// To be called before the pager sleeps, with what it would wait for: calls `look` again and again for a
    /// while, until it finds something. `None` if it did not, or was not called.
    pub fn run<T>(
        &mut self,
        wait: &Wait,
        clock: impl Fn() -> Nanos,
        mut look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        if !wait.served || !self.begins() {
            return None;
        }
        let end = clock().plus_micros(LOOK_OUT_MICROS).min(wait.deadline);
        let found = loop {
            let found = look();
            if found.is_some() || clock() >= end {
                break found;
            }
            std::hint::spin_loop();
        };
        self.ended(found.is_some());
        found
    }

    /// Whether to look out now, after work was done and nothing more is to do; if so
    /// [`Self::ended`] is told how it went.
    pub(crate) const fn begins(&mut self) -> bool {
        if self.sleeps_left > 0 {
            self.sleeps_left -= 1;
            return false;
        }
        self.useful
    }

    /// Whether something came.
    pub(crate) fn ended(&mut self, found: bool) {
        if found {
            self.patience = (self.patience + 1).min(PATIENCE_MAX);
            self.sleeps = SLEEPS_MIN;
            return;
        }
        self.patience = self.patience.saturating_sub(4);
        if self.patience == 0 {
            self.sleeps_left = self.sleeps;
            self.sleeps = (self.sleeps * 2).min(SLEEPS_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of so many times, how often it looks out if every time something came, or nothing.
    fn looks(look_out: &mut LookOut, times: u32, found: bool) -> u32 {
        let mut looks = 0;
        for _ in 0..times {
            if look_out.begins() {
                looks += 1;
                look_out.ended(found);
            }
        }
        looks
    }

    #[test]
    fn it_looks_out_as_long_as_that_pays() {
        let mut look_out = LookOut::if_useful(true);
        assert_eq!(looks(&mut look_out, 1000, true), 1000);
        let in_vain = looks(&mut look_out, 10_000, false);
        assert!((4..30).contains(&in_vain), "{in_vain}");
        // It finds out that it pays again, and does it each time then.
        let tries = looks(&mut look_out, SLEEPS_MAX + 1, true);
        assert!(tries >= 1);
        assert_eq!(looks(&mut look_out, 100, true), 100);
    }

    #[test]
    fn one_miss_in_eight_does_not_end_it() {
        let mut look_out = LookOut::if_useful(true);
        for _ in 0..1000 {
            assert_eq!(looks(&mut look_out, 7, true), 7);
            assert_eq!(looks(&mut look_out, 1, false), 1);
        }
    }

    #[test]
    fn where_it_never_pays_it_never_does() {
        assert_eq!(looks(&mut LookOut::if_useful(false), 100, true), 0);
    }

    #[test]
    fn it_ends_with_what_it_finds_and_with_its_time() {
        let time = std::cell::Cell::new(0);
        let clock = || Nanos::new(time.replace(time.get() + 1_000));
        let wait = |served, deadline| Wait {
            store: None,
            store_writable: false,
            now: Nanos::new(0),
            deadline: Nanos::new(deadline),
            again: false,
            served,
            more: false,
        };
        let mut look_out = LookOut::if_useful(true);
        let looks = std::cell::Cell::new(0);
        let nothing = || {
            looks.set(looks.get() + 1);
            None::<u8>
        };
        assert_eq!(look_out.run(&wait(false, u64::MAX), clock, nothing), None);
        assert_eq!(look_out.run(&wait(true, u64::MAX), clock, nothing), None);
        assert_eq!(looks.get(), LOOK_OUT_MICROS);
        let soon = time.get() + 10_000;
        assert_eq!(look_out.run(&wait(true, soon), clock, nothing), None);
        assert_eq!(looks.get(), LOOK_OUT_MICROS + 10);
        assert_eq!(look_out.run(&wait(true, u64::MAX), clock, || Some(7)), Some(7));
    }
}
