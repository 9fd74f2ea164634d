//! A simulated page store: requests take effect in their order, at some time, and are answered in
//! any order.

use std::collections::{HashMap, VecDeque};

use farmem_region::{
    Completion, FetchPage, Frames, Nanos, Outcome, PAGE_SIZE, PageCount, PageRange, PageStore,
    Readiness, Request, StoreError, StorePage, Ticket,
};

use crate::random::Random;
use crate::run::Plant;

/// An answer takes at most this long, rarely ten times that.
const DELAY_NANOS_MAX: usize = 300_000;
/// Requests that may be under way: some must be refused as busy.
const REQUESTS_MAX: usize = 40;

#[derive(Debug, Clone)]
enum Asked {
    Fetch(Vec<FetchPage>),
    Store(Vec<StorePage>),
    Release(Vec<PageRange>),
    Grow(PageCount),
}

#[derive(Debug, Clone)]
struct Answer {
    due: u64,
    ticket: Ticket,
    outcome: Outcome,
    /// Where fetched contents go when it arrives.
    contents: Vec<(FetchPage, u64)>,
}

#[derive(Debug, Clone, Copy)]
struct Kept {
    version: u64,
    value: u64,
    /// What it was before.
    before: u64,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct SimStore {
    pages: HashMap<u64, Kept>,
    capacity: u64,
    asked: VecDeque<(Ticket, Asked)>,
    answers: Vec<Answer>,
    random: Random,
    plant: Plant,
    pub(crate) failure: Option<String>,
}

impl SimStore {
    pub(crate) fn new(seed: u64, capacity: PageCount, plant: Plant) -> Self {
        Self {
            pages: HashMap::new(),
            capacity: capacity.get(),
            asked: VecDeque::new(),
            answers: Vec::new(),
            random: Random::new(seed),
            plant,
            failure: None,
        }
    }

    /// A request whose answer of this kind is on its way.
    #[cfg(test)]
    pub(crate) fn pending(&self, kind: impl Fn(&Outcome) -> bool) -> Option<Ticket> {
        self.answers.iter().find(|answer| kind(&answer.outcome)).map(|answer| answer.ticket)
    }

    /// When the next answer is due.
    pub(crate) fn next_due(&self) -> Option<u64> {
        self.answers.iter().map(|answer| answer.due).min()
    }

    /// Another session, which has asked for nothing yet, with what is here. Returns how many pages there
    /// may be.
    pub(crate) fn forget_requests(&mut self) -> u64 {
        self.asked.clear();
        self.answers.clear();
        self.capacity
    }

    fn take_effect(&mut self, now: u64, ticket: Ticket, asked: Asked, frames: &dyn Frames) {
        let mut contents = Vec::new();
        let outcome = match asked {
            Asked::Fetch(pages) => {
                for page in pages {
                    contents.push((page, self.value_of(&page)));
                }
                Outcome::Fetched { server_nanos: 0 }
            }
            Asked::Store(pages) => {
                for page in pages {
                    self.keep(&page, frames);
                }
                Outcome::Stored
            }
            Asked::Release(ranges) => {
                for range in ranges {
                    let start = range.start.get();
                    for page in start..start + range.count.get() {
                        self.is_not_fetched(page, "released");
                        self.pages.remove(&page);
                    }
                }
                Outcome::Released
            }
            Asked::Grow(count) => {
                self.capacity += count.get();
                Outcome::Grown { pages: PageCount::new(self.capacity) }
            }
        };
        let rarely = if self.random.once_in(50) { 10 } else { 1 };
        let due = now + (self.random.below(DELAY_NANOS_MAX) * rarely) as u64;
        self.answers.push(Answer { due, ticket, outcome, contents });
    }

    fn value_of(&mut self, asked: &FetchPage) -> u64 {
        let (page, version) = (asked.page.get(), asked.version.get());
        match self.pages.get(&page).copied() {
            Some(kept) if kept.version == version => {
                let stale = self.plant == Plant::ReturnsStalePages && self.random.once_in(300);
                if stale { kept.before } else { kept.value }
            }
            found => {
                let found = found.map(|kept| kept.version);
                let what =
                    format!("page {page} version {version} was asked for, there is {found:?}");
                self.failure.get_or_insert(what);
                0
            }
        }
    }

    /// A fetch may have to be repeated, and must find the page as it was.
    fn is_not_fetched(&mut self, page: u64, what: &str) {
        let mut fetched = self.answers.iter().flat_map(|answer| &answer.contents);
        if fetched.any(|(asked, _)| asked.page.get() == page) {
            let what = format!("page {page} was {what} while it was fetched");
            self.failure.get_or_insert(what);
        }
    }

    fn keep(&mut self, stored: &StorePage, frames: &dyn Frames) {
        let (page, version) = (stored.page.get(), stored.version.get());
        self.is_not_fetched(page, "stored");
        let bytes = frames.bytes(stored.frame);
        let mut value = u64::from_le_bytes(bytes[..8].try_into().unwrap_or([0; 8]));
        assert!(bytes[8..PAGE_SIZE].iter().all(|&byte| byte == 0), "contents are numbers");
        let there = self.pages.get(&page).copied();
        if page >= self.capacity || there.is_some_and(|kept| kept.version >= version) {
            let what = format!("page {page} version {version} was stored over {there:?}");
            self.failure.get_or_insert(what);
        }
        let before = there.map_or(0, |kept| kept.value);
        if self.plant == Plant::LosesStores && self.random.once_in(300) {
            value = before;
        }
        self.pages.insert(page, Kept { version, value, before });
    }
}

impl PageStore for SimStore {
    fn submit(&mut self, ticket: Ticket, request: Request<'_>) -> Result<(), StoreError> {
        // A pager may rely on stores being taken once it has moved pages out for them.
        let must = matches!(request, Request::Store(_));
        if !must && self.asked.len() + self.answers.len() >= REQUESTS_MAX {
            return Err(StoreError::Busy { limit: REQUESTS_MAX });
        }
        let asked = match request {
            Request::Fetch(pages) | Request::FetchAhead(pages) => Asked::Fetch(pages.to_vec()),
            Request::Store(pages) => Asked::Store(pages.to_vec()),
            Request::Release(ranges) => Asked::Release(ranges.to_vec()),
            Request::Grow(count) => Asked::Grow(count),
        };
        self.asked.push_back((ticket, asked));
        Ok(())
    }

    fn advance(
        &mut self,
        now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), StoreError> {
        while !self.asked.is_empty() && !self.random.once_in(4) {
            if let Some((ticket, asked)) = self.asked.pop_front() {
                self.take_effect(now.get(), ticket, asked, frames);
            }
        }
        let mut at = 0;
        while at < self.answers.len() {
            if self.answers[at].due > now.get() {
                at += 1;
                continue;
            }
            let answer = self.answers.swap_remove(at);
            if answer.contents.len() > 1 && self.random.once_in(30) {
                // One of them cannot be read.
                let (server, reason) = ("here".to_owned(), "file failed".to_owned());
                let result = Err(StoreError::Refused { server, reason });
                done.push(Completion { ticket: answer.ticket, result });
                continue;
            }
            for (page, value) in answer.contents {
                let bytes = frames.bytes_mut(page.frame);
                bytes.fill(0);
                bytes[..8].copy_from_slice(&value.to_le_bytes());
            }
            done.push(Completion { ticket: answer.ticket, result: Ok(answer.outcome) });
        }
        Ok(())
    }

    fn readiness(&self) -> Readiness {
        Readiness { descriptor: None, wants_write: false, deadline: None }
    }
}
