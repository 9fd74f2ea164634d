//! [`RegionMap`]: a client's copy of what a named region holds.

use std::collections::HashMap;
use std::time::Instant;

use farmem_region::{ExternalAddress, PageIndex, Version};
use farmem_wire::{Absent, Action, AskMap, Header, MapReply, PageEntry};

use crate::exchange::{Exchange, ExchangeError};

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

    /// Asks for the whole map, as many pages a message as there may be.
    pub(crate) fn download(
        exchange: &mut Exchange,
        session: &Header,
        deadline: Instant,
        news: bool,
    ) -> Result<Self, ExchangeError> {
        let mut stored = HashMap::new();
        let (mut from, mut request, mut leased) = (PageIndex::new(0), 3, true);
        loop {
            let Header { session, region, epoch, incarnation, token, .. } = *session;
            let header = Header::request(Action::Map, request);
            let header = Header { session, region, epoch, incarnation, token, ..header };
            exchange.ask(header, |out| AskMap { from, since: 0, leases: true, news }.encode(out));
            let reply = exchange.wait(deadline)?;
            leased &= reply.header.leased;
            for entry in PageEntry::decode_all(exchange.bytes(reply.entries)) {
                stored.insert(entry.page.get(), entry.version);
            }
            let body = MapReply::decode(exchange.bytes(reply.body))
                .map_err(|error| ExchangeError::BadReply(error.to_string()))?;
            match body.next {
                None => {
                    let MapReply { absent, address, .. } = body;
                    return Ok(Self { stored, absent, address, leased });
                }
                Some(next) if next > from => from = next,
                Some(next) => {
                    let what = format!("its map goes on at page {next} after {from}");
                    return Err(ExchangeError::BadReply(what));
                }
            }
            request += 1;
        }
    }
}
