//! Who may change a named region, and who may believe what it knows of it.
//!
//! ```text
//! a client that holds a lease:   asks .......... answers itself ........ asks again
//!                                |<------- MAP_LEASE ------->|
//! the server, from its arrival:     |<----------- until ---------->|
//! another client's change:                    busy, busy, busy     | stored
//! ```
//!
//! A client with a copy of the map (and pages in its cache) answers from it without asking. So that it
//! never answers what another client has changed since, its right to do so is a lease that every reply
//! renews. Who would change the region is refused as busy while another client's lease lasts; from that
//! moment on the lease is not renewed any more, and none is given before the change was made, so that it
//! waits for one lease at most. The client counts from when it sent its request and the server from when
//! that had arrived, and longer: whatever the delays, the client stops believing first.

use std::time::{Duration, Instant};

use farmem_wire::{MAP_LEASE, RefusalCode};

use crate::session::ConnectionId;

/// A lease is kept so much longer here than its client believes in it: for clocks that run at
/// different speeds, by a third.
const MARGIN: Duration = Duration::from_millis(100);

/// The leases on a region.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Who may change the region; nobody knows until somebody takes it over, or changes it first.
    writer: Option<ConnectionId>,
    held: Vec<Lease>,
    /// Somebody was refused, and is to come before leases are given again: until then, or until he has
    /// made his change.
    awaited: Option<Instant>,
    /// Nobody is given one any more.
    is_closed: bool,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    /// `None`: somebody whom a former process of this server knew.
    holder: Option<ConnectionId>,
    until: Instant,
    /// Somebody waits for its end.
    is_broken: bool,
}

impl Leases {
    /// For a region of a former process of this server, which knew leases that this one does not.
    pub(crate) fn after_restart(now: Instant) -> Self {
        let former = Lease { holder: None, until: now + MAP_LEASE + MARGIN, is_broken: true };
        Self { held: vec![former], ..Self::default() }
    }

    /// A connection is the only writer from now on.
    pub(crate) const fn take_over(&mut self, connection: ConnectionId) {
        self.writer = Some(connection);
    }

    /// A connection goes on where its client's former one broke. The lease of that one ends by itself.
    pub(crate) fn replace(&mut self, former: ConnectionId, connection: ConnectionId) {
        if self.writer == Some(former) {
            self.writer = Some(connection);
        }
    }

    /// Gives a client a lease that has just asked for the map, unless somebody waits for the end of
    /// one. Returns whether it has it now.
    pub(crate) fn grant(&mut self, connection: ConnectionId, now: Instant) -> bool {
        self.held.retain(|lease| lease.until > now);
        let is_awaited = self.awaited.is_some_and(|until| until > now);
        if self.is_closed || is_awaited || self.held.iter().any(|lease| lease.is_broken) {
            return false;
        }
        self.held.retain(|lease| lease.holder != Some(connection));
        let until = now + MAP_LEASE + MARGIN;
        self.held.push(Lease { holder: Some(connection), until, is_broken: false });
        true
    }

    /// Renews a client's lease, if nobody has changed anything since it was given, or waits to.
    pub(crate) fn renew(&mut self, connection: ConnectionId, now: Instant) -> bool {
        let lease = self.held.iter_mut().find(|lease| lease.holder == Some(connection));
        let Some(lease) = lease.filter(|lease| !lease.is_broken) else {
            return false;
        };
        lease.until = lease.until.max(now + MAP_LEASE + MARGIN);
        true
    }

    /// Whether a connection may change the region now. To be called under the lock under which the
    /// change is made.
    pub(crate) fn check_change(
        &mut self,
        connection: ConnectionId,
        now: Instant,
    ) -> Result<(), RefusalCode> {
        if *self.writer.get_or_insert(connection) != connection {
            return Err(RefusalCode::StaleEpoch);
        }
        self.end_others(Some(connection), now)
    }

    /// Whether nobody believes any more what he knows of the region, which is about to go. To be called
    /// under the lock under which it goes.
    pub(crate) fn check_end(
        &mut self,
        connection: Option<ConnectionId>,
        now: Instant,
    ) -> Result<(), RefusalCode> {
        self.end_others(connection, now)
    }

    /// Ends all leases for good, if nobody believes any more what he knows of the region: it goes a little
    /// later.
    pub(crate) fn close(&mut self, now: Instant) -> Result<(), RefusalCode> {
        self.check_end(None, now)?;
        self.is_closed = true;
        Ok(())
    }

    /// The writer's client believes nothing any more. Others may, also some who are not attached any more.
    pub(crate) fn give_up(&mut self, connection: ConnectionId) {
        if self.writer == Some(connection) {
            self.held.retain(|lease| lease.holder != Some(connection));
        }
    }

    fn end_others(
        &mut self,
        connection: Option<ConnectionId>,
        now: Instant,
    ) -> Result<(), RefusalCode> {
        let is_own = |lease: &Lease| connection.is_some() && lease.holder == connection;
        self.held.retain(|lease| is_own(lease) || lease.until > now);
        let mut result = Ok(());
        for lease in self.held.iter_mut().filter(|lease| !is_own(lease)) {
            lease.is_broken = true;
            let until = lease.until + MARGIN;
            self.awaited = Some(self.awaited.map_or(until, |other| other.max(until)));
            result = Err(RefusalCode::Busy);
        }
        if result.is_ok() {
            self.awaited = None;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: ConnectionId = ConnectionId(1);
    const WRITER: ConnectionId = ConnectionId(2);

    #[test]
    fn cap_93_a_change_waits_for_the_lease_of_another_and_only_for_one() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut leases = Leases::default();
        assert!(leases.grant(READER, at(0)));
        leases.take_over(WRITER);
        assert!(leases.renew(READER, at(200)));
        // It was sent at 200 at the latest, so the reader believes until 500 at the latest.
        assert_eq!(leases.check_change(WRITER, at(300)), Err(RefusalCode::Busy));
        assert!(!leases.renew(READER, at(350)) && !leases.grant(READER, at(360)));
        assert_eq!(leases.check_change(WRITER, at(599)), Err(RefusalCode::Busy));
        assert_eq!(leases.check_change(WRITER, at(600)), Ok(()));
        // What the reader knows is out of date, until it asks for the map again.
        assert!(!leases.renew(READER, at(601)));
        assert!(leases.grant(READER, at(602)) && leases.renew(READER, at(603)));
    }

    #[test]
    fn cap_93_one_client_alone_waits_for_nobody() {
        let now = Instant::now();
        let mut leases = Leases::default();
        leases.take_over(WRITER);
        assert!(leases.grant(WRITER, now));
        assert_eq!(leases.check_change(WRITER, now), Ok(()));
        assert!(leases.renew(WRITER, now + Duration::from_secs(60)));
        // Who has only joined changes nothing.
        assert_eq!(leases.check_change(READER, now), Err(RefusalCode::StaleEpoch));
        leases.replace(WRITER, READER);
        assert_eq!(leases.check_change(READER, now), Err(RefusalCode::Busy));
        assert_eq!(leases.check_end(None, now), Err(RefusalCode::Busy));
        assert_eq!(leases.check_end(Some(WRITER), now), Ok(()));
    }

    #[test]
    fn cap_93_only_the_writers_lease_is_given_up() {
        let now = Instant::now();
        let mut leases = Leases::after_restart(now);
        leases.take_over(WRITER);
        leases.give_up(WRITER);
        assert_eq!(leases.check_change(WRITER, now), Err(RefusalCode::Busy), "nobody knows whose");
        let mut leases = Leases::default();
        leases.take_over(WRITER);
        assert!(leases.grant(WRITER, now) && leases.grant(READER, now));
        leases.give_up(READER);
        leases.give_up(WRITER);
        assert_eq!(leases.check_end(Some(READER), now), Ok(()));
        assert_eq!(leases.check_end(None, now), Err(RefusalCode::Busy));
    }

    #[test]
    fn cap_93_leases_of_a_former_process_are_waited_for() {
        let now = Instant::now();
        let mut leases = Leases::after_restart(now);
        assert_eq!(leases.check_change(WRITER, now), Err(RefusalCode::Busy));
        assert!(!leases.grant(READER, now));
        assert_eq!(leases.check_change(WRITER, now + MAP_LEASE + MARGIN), Ok(()));
    }
}
