//! [`RegionMap`]: a client's copy of what a named region holds.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use farmem_region::{ExternalAddress, PageCount, PageIndex, Version};
use farmem_wire::{Absent, Action, AskMap, Header, MapReply, PAGES_PER_MESSAGE_MAX, PageEntry};

use crate::exchange::{Exchange, ExchangeError};

/// Requests for parts of a map that are under way at most. Their replies have 8 KiB each: together they keep
/// a network of 1 Gbit/s busy for 1 ms.
const REQUESTS_MAX: usize = 16;
/// After hello and open.
const FIRST_REQUEST: u64 = 3;

/// Which pages a server has stored of a named region. Its only writer keeps it true by itself.
#[derive(Debug, Clone)]
pub struct RegionMap {
    /// Pages that are stored, with their versions.
    pub stored: HashMap<u64, Version>,
    /// What all other pages hold.
    pub absent: Absent,
    /// Where the first page is.
    pub address: ExternalAddress,
    /// Whether the server told all of it while the client held a lease.
    pub(crate) leased: bool,
}

impl RegionMap {
    /// The first version that is newer than all that are stored.
    #[must_use]
    pub fn next_version(&self) -> Version {
        let newest = self.stored.values().map(|version| version.get()).max();
        Version::new(newest.unwrap_or(0) + 1)
    }

    /// Asks for the whole map of a region of so many pages, as many pages a message as there may be. Each
    /// reply must come `patience` after the one before: all of them take as long as there are pages.
    pub(crate) fn download(
        exchange: &mut Exchange,
        session: &Header,
        pages: PageCount,
        patience: Duration,
        news: bool,
    ) -> Result<Self, ExchangeError> {
        let Header { session, region, epoch, incarnation, token, .. } = *session;
        let request = |number| {
            let header = Header::request(Action::Map, number);
            Header { session, region, epoch, incarnation, token, ..header }
        };
        let mut asked = Stretches::new(pages);
        let (mut stored, mut leased) = (HashMap::new(), true);
        let body = |from| AskMap { from: PageIndex::new(from), since: 0, leases: true, news };
        // The first one asks for the lease and the news, if that is wanted.
        exchange.ask(request(asked.first()), |out| body(0).encode(out));
        loop {
            let reply = exchange.wait(Instant::now() + patience)?;
            leased &= reply.header.leased;
            let map = MapReply::decode(exchange.bytes(reply.body))
                .map_err(|error| ExchangeError::BadReply(error.to_string()))?;
            let stretch = asked.take(reply.header.request)?;
            let told = PageEntry::decode_all(exchange.bytes(reply.entries));
            // Of what lies beyond, the reply to another request tells.
            let own = told.filter(|entry| entry.page.get() < stretch.end);
            stored.extend(own.map(|entry| (entry.page.get(), entry.version)));
            asked.go_on(stretch, map.next)?;
            while let Some((number, from)) = asked.next() {
                exchange.ask_also(request(number), |out| body(from).encode(out));
            }
            if asked.are_done() {
                let MapReply { absent, address, .. } = map;
                return Ok(Self { stored, absent, address, leased });
            }
        }
    }
}

/// A part of a region of which the map is being asked for.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    /// The request that is under way; 0 if it is not sent.
    request: u64,
    from: u64,
    end: u64,
}

/// What is left to be told of a region, with several requests under way. How many pages of a part are stored
/// nobody knows beforehand: when one has been told, the largest one that is left is divided.
#[derive(Debug)]
struct Stretches {
    pages: u64,
    list: Vec<Stretch>,
    last: u64,
}

impl Stretches {
    fn new(pages: PageCount) -> Self {
        Self { pages: pages.get(), list: Vec::new(), last: FIRST_REQUEST - 1 }
    }

    /// The request for all of it, from its first page on.
    fn first(&mut self) -> u64 {
        self.last += 1;
        // The region may have become larger.
        self.list.push(Stretch { request: self.last, from: 0, end: u64::MAX });
        self.last
    }

    /// Takes out what a reply tells of.
    fn take(&mut self, request: u64) -> Result<Stretch, ExchangeError> {
        let at = self.list.iter().position(|stretch| stretch.request == request);
        let at = at.ok_or_else(|| bad("it told of a part of the map that was not asked for"))?;
        Ok(self.list.swap_remove(at))
    }

    /// Puts back what the reply left over.
    fn go_on(&mut self, stretch: Stretch, next: Option<PageIndex>) -> Result<(), ExchangeError> {
        let Stretch { from, end, .. } = stretch;
        match next.map(PageIndex::get) {
            Some(next) if next <= from => {
                Err(bad(&format!("its map goes on at page {next} after {from}")))
            }
            Some(next) if next < end => {
                self.list.push(Stretch { request: 0, from: next, end });
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The next request to be sent, and where it begins.
    fn next(&mut self) -> Option<(u64, u64)> {
        if self.list.iter().all(|stretch| stretch.request != 0) {
            self.divide()?;
        }
        let stretch = self.list.iter_mut().find(|stretch| stretch.request == 0)?;
        self.last += 1;
        stretch.request = self.last;
        Some((stretch.request, stretch.from))
    }

    /// Makes two of the largest part, if one more request may be under way and it is worth one.
    fn divide(&mut self) -> Option<()> {
        let pages = self.pages;
        let size = |stretch: &Stretch| stretch.end.min(pages).saturating_sub(stretch.from);
        let room = self.list.len() < REQUESTS_MAX;
        let largest = self.list.iter_mut().filter(|_| room).max_by_key(|stretch| size(stretch))?;
        let half = size(largest) / 2;
        if half < PAGES_PER_MESSAGE_MAX as u64 {
            return None;
        }
        let (from, end) = (largest.from + half, largest.end);
        largest.end = from;
        self.list.push(Stretch { request: 0, from, end });
        Some(())
    }

    const fn are_done(&self) -> bool {
        self.list.is_empty()
    }
}

fn bad(what: &str) -> ExchangeError {
    ExchangeError::BadReply(what.to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What is asked of a server that has these pages: how many requests wait for replies at most, one after
    /// the other, and whether all that it has is told, once.
    fn ask_all(pages: u64, stored: &BTreeSet<u64>) -> (usize, usize) {
        let mut asked = Stretches::new(PageCount::new(pages));
        let (mut told, mut rounds, mut most) = (BTreeSet::new(), 0, 1);
        let mut under_way = vec![(asked.first(), 0)];
        while !under_way.is_empty() {
            rounds += 1;
            most = most.max(under_way.len());
            for (request, from) in std::mem::take(&mut under_way) {
                let entries: Vec<u64> = stored.range(from..).take(257).copied().collect();
                let stretch = asked.take(request).unwrap();
                let own = entries.iter().take(256).filter(|page| **page < stretch.end);
                assert!(own.into_iter().all(|page| told.insert(*page)), "told twice");
                asked.go_on(stretch, entries.get(256).copied().map(PageIndex::new)).unwrap();
                under_way.extend(std::iter::from_fn(|| asked.next()));
            }
        }
        assert!(asked.are_done());
        assert_eq!(told, *stored);
        (rounds, most)
    }

    #[test]
    fn a_map_is_told_by_several_requests_at_once_wherever_the_pages_lie() {
        let pages = 1 << 20;
        assert_eq!(ask_all(pages, &BTreeSet::new()), (1, 1));
        assert_eq!(ask_all(pages, &(7..200).collect()), (1, 1));
        let all_over: BTreeSet<u64> = (0..pages).step_by(16).collect();
        let in_front = (0..1 << 16).collect();
        let at_the_end = (pages - (1 << 16)..pages + 5).collect();
        let in_two: BTreeSet<u64> = (0..1 << 15).chain(900_000..900_000 + (1 << 15)).collect();
        for stored in [all_over, in_front, at_the_end, in_two] {
            // 256 replies; one at a time would be as many rounds.
            let (rounds, most) = ask_all(pages, &stored);
            assert!(rounds < 50 && most <= REQUESTS_MAX, "{rounds} rounds of {most} requests");
        }
    }

    #[test]
    fn a_map_that_does_not_go_on_is_refused() {
        let mut asked = Stretches::new(PageCount::new(1 << 20));
        let request = asked.first();
        assert!(asked.take(request + 1).is_err());
        let stretch = asked.take(request).unwrap();
        assert!(asked.go_on(stretch, Some(PageIndex::new(0))).is_err());
    }
}
