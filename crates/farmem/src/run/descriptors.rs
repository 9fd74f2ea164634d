//! The supervisor's descriptors: each pager costs it some, and what cannot be opened any more is lost.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

/// So many must be left for another pager: its stats page, its own process and its program, a userfaultfd for
/// each of two images, and what a look at /proc takes meanwhile.
const NEEDED: usize = 8;
/// How long nobody is accepted after that has failed: the listener would be reported as ready all the time.
pub(crate) const DEAF: Duration = Duration::from_secs(1);

/// Whether another pager can be taken in.
pub(crate) fn are_left(any: impl AsFd) -> bool {
    let spare = |_| rustix::io::fcntl_dupfd_cloexec(&any, 0);
    (0..NEEDED).map(spare).collect::<rustix::io::Result<Vec<OwnedFd>>>().is_ok()
}

/// What to tell people where they are not.
pub(crate) fn shortage() -> String {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    format!(
        "`farmem run` has nearly all of the {limit} descriptors open that it may have (raise `ulimit -Hn`)"
    )
}

/// Whether callers are listened to.
#[derive(Debug, Default)]
pub(crate) struct Hearing {
    /// Not before this time.
    deaf_until: Option<Instant>,
    told: bool,
}

impl Hearing {
    /// When to listen again, if not now.
    pub(crate) const fn deaf_until(&self) -> Option<Instant> {
        self.deaf_until
    }

    /// Nobody can be accepted now.
    pub(crate) fn rest(&mut self, now: Instant) {
        self.deaf_until = Some(now + DEAF);
    }

    /// To be called at each turn.
    pub(crate) fn turned(&mut self, now: Instant) {
        self.deaf_until.take_if(|until| *until <= now);
    }

    /// Whether it has not been told since somebody was heard that one cannot be.
    pub(crate) const fn is_news(&mut self) -> bool {
        !std::mem::replace(&mut self.told, true)
    }

    /// Somebody was.
    pub(crate) const fn heard(&mut self) {
        self.told = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_failure_nobody_is_listened_to_for_a_while() {
        let mut hearing = Hearing::default();
        let now = Instant::now();
        hearing.rest(now);
        assert_eq!(hearing.deaf_until(), Some(now + DEAF));
        hearing.turned(now + DEAF / 2);
        assert!(hearing.deaf_until().is_some());
        hearing.turned(now + DEAF);
        assert_eq!(hearing.deaf_until(), None);
    }

    #[test]
    fn a_failure_is_told_each_time_that_it_begins() {
        let mut hearing = Hearing::default();
        assert!(hearing.is_news());
        assert!(!hearing.is_news());
        hearing.heard();
        assert!(hearing.is_news());
    }
}
