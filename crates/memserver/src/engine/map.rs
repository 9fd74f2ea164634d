//! The map of a region: which pages are stored. Clients keep a copy of it, so that what is absent
//! costs them no question.

use std::time::Instant;

use farmem_region::PageIndex;
use farmem_wire::{Absent, AskMap, Header, MapReply, PAGES_PER_MESSAGE_MAX, PageEntry};

use super::{Caller, Engine, Refusal};
use crate::region::Source;
use crate::table::{self, LEAF_PAGES};

impl Engine {
    /// Tells a client of pages that are stored: those of leaves that have changed since it asked
    /// last. If pages were forgotten since, it is told of all from the beginning. Returns also whether it
    /// holds a lease.
    pub(crate) fn map(
        &self,
        caller: &Caller,
        header: &Header,
        ask: &AskMap,
        mut tell: impl FnMut(PageEntry),
    ) -> Result<(MapReply, bool), Refusal> {
        let mut session = self.enter(caller, header)?;
        session.check_region(header)?;
        let is_first = ask.from == PageIndex::new(0);
        let leased = if ask.leases && session.is_resident && is_first {
            session.leases.grant(caller.connection, Instant::now())
        } else {
            // Renewed, or not, before.
            header.leased
        };
        let region = &session.region;
        let (stamp, forgot) = region.table.changes();
        // A stamp that was never given is another server's, or another region's.
        let is_all = ask.since < forgot || ask.since > stamp;
        let since = if is_all { 0 } else { ask.since };
        let (mut left, mut from, mut next) = (PAGES_PER_MESSAGE_MAX, ask.from, None);
        'leaves: while let Some((first, leaf)) = region.table.leaf_from(from) {
            let leaf = table::lock(leaf);
            if leaf.changed > since {
                for (at, portion) in leaf.portions.iter() {
                    let page = PageIndex::new(first.get() + at as u64);
                    if page < from {
                        continue;
                    }
                    if left == 0 {
                        next = Some(page);
                        break 'leaves;
                    }
                    left -= 1;
                    tell(self.entry(region, page, &portion));
                }
            }
            from = PageIndex::new(first.get() + LEAF_PAGES as u64);
        }
        let absent = match &region.source {
            Source::Nothing => Absent::Nothing,
            Source::Fill(byte) => Absent::Fill(*byte),
            Source::File(_) => Absent::Unknown,
        };
        let address = region.address(PageIndex::new(0), &self.config);
        Ok((MapReply { stamp, next, address, absent, is_all }, leased))
    }

    /// Renews the lease of a client, whose request has arrived; returns whether it goes on.
    pub(crate) fn renew_lease(&self, caller: &Caller, header: &Header) -> bool {
        let session = self.enter(caller, header);
        session.is_ok_and(|mut session| session.leases.renew(caller.connection, Instant::now()))
    }
}
