//! The map of a region: which pages are stored. Clients keep a copy of it, so that what is absent
//! costs them no question.

use std::time::Instant;

use farmem_region::PageIndex;
use farmem_wire::{Absent, AskMap, Header, MapChange, MapReply, PAGES_PER_MESSAGE_MAX, PageEntry};

use super::{Caller, Engine, Refusal};
use crate::news::Told;
use crate::region::{Region, Source};
use crate::session::Session;
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
        if ask.news && session.is_resident && is_first {
            let (stamp, _) = session.region.table.changes();
            session.region.news.get_or_insert_default().listen(caller.connection, stamp);
        }
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
        Ok((MapReply { next, is_all, ..self.map_reply(region, stamp) }, leased))
    }

    fn map_reply(&self, region: &Region, stamp: u64) -> MapReply {
        let absent = match &region.source {
            Source::Nothing => Absent::Nothing,
            Source::Fill(byte) => Absent::Fill(*byte),
            Source::File(_) => Absent::Unknown,
        };
        let address = region.address(PageIndex::new(0), &self.config);
        let (next, is_all, is_outdated) = (None, false, false);
        MapReply { stamp, next, address, absent, is_all, is_outdated }
    }

    /// Tells a client that listens what others have changed since it was told last, if they have; to be
    /// sent ahead of the reply to a request that has arrived. Returns also whether that reply renews its
    /// lease, or gives it one: it does if the client knows all then, and nobody waits to change more.
    pub(crate) fn tell_news(
        &self,
        caller: &Caller,
        header: &Header,
        tell: impl FnMut(MapChange),
    ) -> (Option<MapReply>, bool) {
        let Ok(mut session) = self.enter(caller, header) else {
            return (None, false);
        };
        let Session { region, leases, .. } = &mut *session;
        let (stamp, _) = region.table.changes();
        let Some(news) = region.news.as_mut().filter(|news| news.listens(caller.connection)) else {
            return (None, leases.renew(caller.connection, Instant::now()));
        };
        let told = news.tell(caller.connection, stamp, tell);
        let knows_all = told.is_none_or(|told| told.is_complete);
        let now = Instant::now();
        let leased = caller.holds_lease
            && knows_all
            && (leases.renew(caller.connection, now) || leases.grant(caller.connection, now));
        let reply = told.map(|told| {
            let Told { stamp, is_outdated, is_complete: _ } = told;
            MapReply { is_outdated, ..self.map_reply(region, stamp) }
        });
        (reply, leased)
    }

    /// Renews the lease of a client, whose request has arrived; returns whether it goes on.
    pub(crate) fn renew_lease(&self, caller: &Caller, header: &Header) -> bool {
        let session = self.enter(caller, header);
        session.is_ok_and(|mut session| session.leases.renew(caller.connection, Instant::now()))
    }
}
