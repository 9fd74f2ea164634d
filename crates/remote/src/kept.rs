//! [`KeptMap`]: a client's copy of the map of a region that somebody else writes. What changes comes
//! with replies; as long as a reply has said that nothing else does, the copy is believed.

use std::time::Duration;

use farmem_region::{PageCount, PageIndex, PageRange, Version};
use farmem_wire::{Absent, Action, Header, MAP_LEASE, MapChange};

use crate::exchange::News;
use crate::map::RegionMap;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct KeptMap {
    map: RegionMap,
    /// More has changed than was told.
    pub(crate) is_outdated: bool,
    /// By [`now`].
    believed_until: Option<Duration>,
}

impl KeptMap {
    /// What was just downloaded; nobody has said that it still is so.
    pub(crate) const fn new(map: RegionMap) -> Self {
        Self { map, is_outdated: false, believed_until: None }
    }

    /// Takes what others have changed.
    pub(crate) fn learn(&mut self, news: Vec<News>) {
        for News { changes, is_outdated } in news {
            self.is_outdated |= is_outdated;
            changes.iter().for_each(|change| self.change(change));
        }
    }

    /// Takes a change, somebody's or the client's own.
    pub(crate) fn change(&mut self, change: &MapChange) {
        let start = change.range.start.get();
        let end = start.saturating_add(change.range.count.get());
        match change.version {
            None => self.map.stored.retain(|page, _| !(start..end).contains(page)),
            Some(version) => self.map.stored.extend((start..end).map(|page| (page, version))),
        }
    }

    /// Takes what a reply, to a request that was sent at a time, says of the lease.
    pub(crate) fn note_lease(&mut self, reply: &Header, sent: Duration) {
        if reply.action != Action::Write && reply.refusal.is_none() {
            self.believed_until = reply.leased.then(|| sent + MAP_LEASE);
        }
    }

    /// Whether nobody has changed anything that it does not say.
    pub(crate) fn is_believed(&self) -> bool {
        !self.is_outdated && self.believed_until.is_some_and(|until| now() < until)
    }

    /// The byte that all pages of a range hold over and over, if they are known to.
    pub(crate) fn fill_of(&self, start: u64, end: u64) -> Option<u8> {
        let Absent::Fill(fill) = self.map.absent else {
            return None;
        };
        let is_absent = |page: u64| !self.map.stored.contains_key(&page);
        (self.is_believed() && (start..end).all(is_absent)).then_some(fill)
    }
}

/// That pages are stored, or are not any more.
pub(crate) const fn changed(start: u64, count: u64, version: Option<Version>) -> MapChange {
    let range = PageRange { start: PageIndex::new(start), count: PageCount::new(count) };
    MapChange { range, version }
}

/// A clock that goes on while the machine sleeps.
pub(crate) fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    // Neither is ever negative.
    Duration::new(time.tv_sec.cast_unsigned(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
