//! What has changed of a region, for clients that keep a copy of its map: they are told on the way,
//! ahead of replies to what they ask anyway.
//!
//! ```text
//! changes, oldest first:   | 17: page 5 in version 3 | 19: pages 8..40 absent | 20: ... |
//!                                        ^ a client has been told up to here
//! ```
//!
//! Only what makes a difference to a reader is remembered: what was written or forgotten, not that a
//! page was made from the source, or lies elsewhere. Who makes a change is not told of it.

use std::collections::VecDeque;

use farmem_region::{PageCount, PageRange};
use farmem_wire::{MapChange, NEWS_MAX};

use crate::session::ConnectionId;

/// Changes that are remembered of a region, as long as anybody wants to be told. A client that is
/// further behind asks for the map again: to tell it more would take longer than that.
const CHANGES_MAX: usize = 256;

/// What has changed, and who has been told of how much of it.
#[derive(Debug, Default)]
pub(crate) struct News {
    /// By the table's count of changes.
    changes: VecDeque<(u64, MapChange)>,
    /// Changes up to this count may be forgotten.
    forgot: u64,
    listeners: Vec<Listener>,
}

#[derive(Debug, Clone, Copy)]
struct Listener {
    connection: ConnectionId,
    told: u64,
}

/// How much a client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Told {
    /// The count up to which it knows all.
    pub(crate) stamp: u64,
    /// Whether it knows all there is.
    pub(crate) is_complete: bool,
    /// Whether it is to ask for the map again.
    pub(crate) is_outdated: bool,
}

impl News {
    /// A client knows all up to a count, and is told of what comes.
    pub(crate) fn listen(&mut self, connection: ConnectionId, told: u64) {
        self.leave(connection);
        if self.listeners.is_empty() {
            // Nothing was remembered before.
            self.changes.clear();
            self.forgot = told;
        }
        self.listeners.push(Listener { connection, told });
    }

    /// Returns whether nobody listens any more.
    pub(crate) fn leave(&mut self, connection: ConnectionId) -> bool {
        self.listeners.retain(|listener| listener.connection != connection);
        self.listeners.is_empty()
    }

    pub(crate) fn listens(&self, connection: ConnectionId) -> bool {
        self.listeners.iter().any(|listener| listener.connection == connection)
    }

    /// Remembers a change, which made the count what it is.
    pub(crate) fn note(&mut self, count: u64, change: MapChange) {
        if let Some((last, former)) = self.changes.back_mut()
            && let Some(both) = joined(former, &change)
        {
            // Who knows the former part is told of it once more.
            (*last, *former) = (count, both);
            return;
        }
        if self.changes.len() == CHANGES_MAX
            && let Some((oldest, _)) = self.changes.pop_front()
        {
            self.forgot = oldest;
        }
        self.changes.push_back((count, change));
    }

    /// Nobody is told of changes up to a count: whoever knows less asks for the map again.
    pub(crate) fn outdate(&mut self, count: u64) {
        self.changes.clear();
        self.forgot = count;
    }

    /// Whether a client has been told of all that was noted.
    pub(crate) fn is_told(&self, connection: ConnectionId) -> bool {
        let last = self.changes.back().map_or(0, |(count, _)| *count).max(self.forgot);
        let mut listeners = self.listeners.iter();
        listeners.any(|listener| listener.connection == connection && listener.told >= last)
    }

    /// A client knows all up to a count, as it has made the last changes itself.
    pub(crate) fn skip(&mut self, connection: ConnectionId, count: u64) {
        let mut listeners = self.listeners.iter_mut();
        if let Some(listener) = listeners.find(|listener| listener.connection == connection) {
            listener.told = count;
        }
    }

    /// Tells a client what it has not been told yet, or a first part of it. `count` is the table's now.
    /// `None` if there is nothing to tell.
    pub(crate) fn tell(
        &mut self,
        connection: ConnectionId,
        count: u64,
        mut tell: impl FnMut(MapChange),
    ) -> Option<Told> {
        let at = self.listeners.iter().position(|listener| listener.connection == connection)?;
        let told = self.listeners[at].told;
        if told < self.forgot {
            self.listeners.swap_remove(at);
            return Some(Told { stamp: told, is_complete: false, is_outdated: true });
        }
        let from = self.changes.partition_point(|(count, _)| *count <= told);
        let (mut stamp, mut is_complete) = (count, true);
        for (number, (count, change)) in self.changes.range(from..).enumerate() {
            if number == NEWS_MAX {
                is_complete = false;
                break;
            }
            tell(*change);
            stamp = *count;
        }
        let is_news = self.changes.len() > from;
        if is_complete {
            stamp = count;
        }
        self.listeners[at].told = stamp;
        is_news.then_some(Told { stamp, is_complete, is_outdated: false })
    }
}

/// Both changes as one, if the latter says the same of the next pages, or more of the same one.
fn joined(former: &MapChange, latter: &MapChange) -> Option<MapChange> {
    if former.range == latter.range && former.version.is_some() == latter.version.is_some() {
        return Some(*latter);
    }
    let is_next = former.range.end() == Some(latter.range.start);
    let count = former.range.count.get().saturating_add(latter.range.count.get());
    let range = PageRange { start: former.range.start, count: PageCount::new(count) };
    (is_next && former.version == latter.version)
        .then_some(MapChange { range, version: former.version })
}

#[cfg(test)]
mod tests {
    use farmem_region::{PageIndex, Version};

    use super::*;

    const ONE: ConnectionId = ConnectionId(1);
    const OTHER: ConnectionId = ConnectionId(2);

    fn change(page: u64, count: u64, version: Option<u64>) -> MapChange {
        let range = PageRange { start: PageIndex::new(page), count: PageCount::new(count) };
        MapChange { range, version: version.map(Version::new) }
    }

    fn told(news: &mut News, who: ConnectionId, count: u64) -> (Vec<MapChange>, Option<Told>) {
        let mut changes = Vec::new();
        let told = news.tell(who, count, |change| changes.push(change));
        (changes, told)
    }

    #[test]
    fn cap_93_each_is_told_once_and_only_of_what_others_did() {
        let mut news = News::default();
        news.listen(ONE, 10);
        news.listen(OTHER, 10);
        assert_eq!(told(&mut news, ONE, 10), (vec![], None));
        news.note(11, change(5, 1, Some(3)));
        news.note(12, change(6, 1, Some(3)));
        news.note(13, change(6, 1, Some(4)));
        let complete = |stamp| Some(Told { stamp, is_complete: true, is_outdated: false });
        // Pages side by side in one version are one entry.
        let all = vec![change(5, 2, Some(3)), change(6, 1, Some(4))];
        assert_eq!(told(&mut news, ONE, 13), (all.clone(), complete(13)));
        assert_eq!(told(&mut news, ONE, 14), (vec![], None), "what was noted last is nothing new");
        assert!(news.is_told(ONE) && !news.is_told(OTHER));
        news.note(15, change(0, 512, None));
        news.skip(ONE, 15);
        assert_eq!(told(&mut news, ONE, 15), (vec![], None));
        let all = [all, vec![change(0, 512, None)]].concat();
        assert_eq!(told(&mut news, OTHER, 15), (all, complete(15)));
        assert!(!news.leave(ONE) && news.leave(OTHER));
    }

    #[test]
    fn cap_93_news_are_bounded_and_who_is_far_behind_asks_again() {
        let mut news = News::default();
        news.listen(ONE, 0);
        for at in 1..=150 {
            news.note(at, change(at * 2, 1, Some(at)));
        }
        for (first, count) in [(1, 64), (65, 64), (129, 22)] {
            let (changes, told) = told(&mut news, ONE, 150);
            assert_eq!((changes[0].range.start.get(), changes.len()), (first * 2, count));
            assert_eq!(told.map(|told| told.is_complete), Some(count < 64));
        }
        for at in 151..=150 + CHANGES_MAX as u64 {
            news.note(at, change(at * 2, 1, Some(at)));
        }
        assert_eq!(told(&mut news, ONE, 500).0.len(), 64, "as many as are remembered");
        for at in 1000..=1000 + CHANGES_MAX as u64 {
            news.note(at, change(at * 2, 1, Some(at)));
        }
        let (changes, outdated) = told(&mut news, ONE, 2000);
        assert!(changes.is_empty() && outdated.is_some_and(|told| told.is_outdated));
        assert_eq!(told(&mut news, ONE, 2000), (vec![], None), "it is told once");
        news.listen(ONE, 2000);
        assert_eq!(told(&mut news, ONE, 2000), (vec![], None));
    }
}
