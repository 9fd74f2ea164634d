//! What is read of regions is remembered, and brought near ahead of being asked for.

use farmem_region::{PageCount, PageIndex};
use farmem_wire::{Header, Progress, RefusalCode};

use super::named::Work;
use super::pages::SPARE_SLOTS;
use super::supply::{Purpose, Stop, Supply};
use super::{Bring, Caller, Engine, Refusal, SharedSession, lock};
use crate::journal::Record;
use crate::log::{LogLevel, LogLine};
use crate::region::Region;
use crate::session::Session;

/// Of the memory, what is brought in ahead takes at most this part: it takes the place of what nobody
/// has asked for yet, but that may come.
const PREFETCHED_32NDS: u64 = 16;

impl Engine {
    /// Remembers that a stored page was read.
    pub(super) fn note_read(&self, region: &mut Region, page: PageIndex) {
        // What is read is worth nothing where hardly anything more can be noted.
        if !region.working_set.is_news(page)
            || self.check_journal().is_err()
            || region.table.with(page, |_| ()).is_none()
        {
            return;
        }
        if let Some(begins) = region.working_set.touch(page) {
            let region = region.id;
            self.tiers.note(|| Record::Read { region, page, begins });
        }
    }

    /// Whether there is anybody who may use a session's working set later.
    pub(super) fn keeps_working_set(&self, session: &Session) -> bool {
        !session.is_temporary && (session.is_resident || self.has_journal())
    }

    /// Brings the working set of the caller's region into dram, in its order.
    pub(crate) fn prefetch_working_set(
        &self,
        caller: &Caller,
        header: &Header,
    ) -> Result<Progress, Refusal> {
        self.enter(caller, header)?.check_region(header)?;
        if !caller.may_wait {
            return Err(Refusal::waits());
        }
        let Some((_, shared)) = &caller.session else {
            return Ok(Progress { changed: PageCount::new(0), next: None });
        };
        let mut room = self.slots_at(PREFETCHED_32NDS);
        let changed = PageCount::new(self.bring_working_set(shared, &mut room)?);
        Ok(Progress { changed, next: None })
    }

    /// Brings the working sets of all regions into dram, on a thread of its own: what a former process
    /// was asked for.
    pub(crate) fn replay_working_sets(&self) {
        let all: Vec<SharedSession> = self.sessions().by_id.values().cloned().collect();
        let (mut pages, mut room) = (0, self.slots_at(PREFETCHED_32NDS));
        for shared in all {
            match self.bring_working_set(&shared, &mut room) {
                Ok(moved) => pages += moved,
                // There are others who need the room.
                Err(Refusal { code: RefusalCode::Busy | RefusalCode::Full, .. }) => break,
                Err(refusal) => {
                    let (name, code) = (lock(&shared).name.clone(), refusal.code.name());
                    let message = format_args!("cannot prefetch what {name} reads first: {code}");
                    self.tell("prefetch_failed", message);
                }
            }
        }
        if pages > 0 {
            let message = format_args!("brought {pages} pages into memory that are read first");
            let line = LogLine::new(LogLevel::Info, "prefetched", message);
            self.log.line(&line.with("pages", pages));
        }
    }

    /// Brings a working set into dram, or as many of its first pages as there is `room` for. Returns
    /// how many pages have moved.
    fn bring_working_set(&self, shared: &SharedSession, room: &mut u64) -> Result<u64, Refusal> {
        let order = lock(shared).region.working_set.order();
        let mut supply = Supply::of(Purpose::Keep);
        let mut work = Work::of_one_request();
        let mut result = Ok(());
        for pages in order.chunks(SPARE_SLOTS as usize) {
            if result.is_err() || *room == 0 || self.is_stopping() {
                break;
            }
            let pages = &pages[..pages.len().min(usize::try_from(*room).unwrap_or(usize::MAX))];
            *room -= pages.len() as u64;
            result = self.bring_pages(shared, pages, &mut work, &mut supply);
        }
        self.end_supply(supply);
        result.map(|()| work.changed)
    }

    /// Brings some pages into dram. What is read from a disk is read at once.
    fn bring_pages(
        &self,
        shared: &SharedSession,
        pages: &[PageIndex],
        work: &mut Work,
        supply: &mut Supply,
    ) -> Result<(), Refusal> {
        loop {
            let mut session = lock(shared);
            if session.ended {
                return Ok(());
            }
            let region = &mut session.region;
            // What was forgotten since is not made again.
            let stored = |page: &&PageIndex| region.table.with(**page, |_| ()).is_some();
            let pages: Vec<PageIndex> = pages.iter().filter(stored).copied().collect();
            let brought = pages.iter().try_for_each(|page| {
                let piece = page.get()..page.get() + 1;
                self.bring_piece(region, piece, Bring::Prefetch, work, supply)
            });
            let needs = match brought {
                Ok(()) => return Ok(()),
                Err(Stop::Refused(refusal)) => return Err(refusal),
                Err(Stop::Needs(need)) => self.with_next(region, need, pages.into_iter()),
            };
            drop(session);
            self.supply(true, needs, supply)?;
        }
    }
}
