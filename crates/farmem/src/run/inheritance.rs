//! How a forked child gets from its parent's pager to one of its own.
//!
//! A child's memory is served by its parent's pager first. When the child has a pager of its own, that
//! one is offered the userfaultfds of the children that it may be, and knows its own. Then the
//! parent's pager writes down what is out of the child, and the child's takes over from there:
//!
//! ```text
//!  child's pager          supervisor            parent's pager
//!       | -- hello ----------> |                       |
//!       | <---- offered (n) -- |                       |
//!       | -- recognised -----> | -- hand over -------> | stops to answer the child
//!       |                      | <---- handed over --- | with a file
//!       | <---- welcome ------ |                       |
//!       | -- armed ----------> | -- taken -----------> | lets go
//! ```
//!
//! Whatever goes wrong on the way, the child is *returned*: its parent's pager serves it as before.
//! All the while the supervisor holds the child's userfaultfd, so that its faults wait.

use std::os::fd::OwnedFd;
use std::time::Instant;

use farmem_supervise::{Offer, SessionReport, SupervisorMessage, Welcome};
use rustix::process::Pid;

use crate::run::pagers::Pager;
use crate::run::supervisor::{PagerId, READAHEAD_PAGES_MAX, RESERVATION_BYTES, Supervisor};

/// Children offered to one pager at most, the newest first: so many messages fit in its buffer.
const OFFERS_MAX: usize = 64;

impl Supervisor {
    /// Offers a pager the children that it may be the pager of; false if there are none.
    pub(super) fn offer_children(&mut self, id: PagerId, program: Pid) -> bool {
        if self.parts.spill.is_some() {
            // What one pager has put in its file no other one can read.
            return false;
        }
        let parents = self.pagers.iter().filter(|&(&other, pager)| {
            other != id && pager.has_children() && pager.is_parent_of(program)
        });
        let mut offers: Vec<(Offer, OwnedFd)> = parents
            .flat_map(|(&other, pager)| {
                pager
                    .children_to_offer()
                    .map(move |(key, uffd)| (Offer { pager: other, key }, uffd))
            })
            .filter_map(|(offer, uffd)| Some((offer, uffd.try_clone_to_owned().ok()?)))
            .collect();
        offers.sort_by_key(|(offer, _)| std::cmp::Reverse(offer.key));
        offers.truncate(OFFERS_MAX);
        let Some(peer) = self.pagers.get(&id).and_then(Pager::peer) else {
            return false;
        };
        for (offer, uffd) in &offers {
            use std::os::fd::AsFd;
            if peer.send_with(&SupervisorMessage::Offered(*offer), &[uffd.as_fd()]).is_err() {
                break;
            }
        }
        !offers.is_empty() && peer.send(&SupervisorMessage::AllOffered).is_ok()
    }

    /// A pager knows which of the children it was offered its program is.
    pub(super) fn recognised(&mut self, id: PagerId, offer: Option<Offer>) {
        let asked = offer.is_some_and(|offer| self.ask_for(id, offer));
        if !asked {
            self.welcome(id, None);
        }
    }

    fn ask_for(&mut self, id: PagerId, offer: Offer) -> bool {
        let Some(program_pid) = self.pagers.get(&id).map(Pager::program_pid) else {
            return false;
        };
        let Some(parent) = self.pagers.get_mut(&offer.pager).filter(|_| offer.pager != id) else {
            return false;
        };
        let message = SupervisorMessage::HandOver { key: offer.key, program_pid };
        let asked = parent.promise(offer.key)
            && parent.peer().is_some_and(|peer| peer.send(&message).is_ok());
        if asked && let Some(pager) = self.pagers.get_mut(&id) {
            pager.inherits = Some(offer);
        }
        asked
    }

    /// A child is handed over, with what is known of it in a file, or is not.
    pub(super) fn handed_over(&mut self, from: PagerId, key: u64, file: Option<OwnedFd>) {
        let offer = Offer { pager: from, key };
        let heir = self.pagers.iter().find(|(_, pager)| pager.inherits == Some(offer));
        let heir = heir.map(|(&heir, _)| heir);
        let session = self.pagers.get(&from).and_then(Pager::session).cloned();
        match (heir, file.zip(session)) {
            (Some(heir), Some(legacy)) => self.welcome(heir, Some(legacy)),
            (Some(heir), None) => {
                self.return_child(heir);
                self.welcome(heir, None);
            }
            (None, _) => self.tell_of_child(offer, &SupervisorMessage::Returned { key }),
        }
    }

    /// A pager serves the child that it was promised: its parent's need no longer.
    pub(super) fn child_taken(&mut self, id: PagerId) {
        let Some(offer) = self.pagers.get_mut(&id).and_then(|pager| pager.inherits.take()) else {
            return;
        };
        self.tell_of_child(offer, &SupervisorMessage::Taken { key: offer.key });
        if let Some(parent) = self.pagers.get_mut(&offer.pager) {
            parent.remove_child(offer.key, Instant::now());
        }
    }

    /// A pager will not serve the child that it was promised.
    pub(super) fn return_child(&mut self, id: PagerId) {
        let Some(offer) = self.pagers.get_mut(&id).and_then(|pager| pager.inherits.take()) else {
            return;
        };
        if let Some(parent) = self.pagers.get_mut(&offer.pager) {
            parent.unpromise(offer.key);
        }
        self.tell_of_child(offer, &SupervisorMessage::Returned { key: offer.key });
    }

    fn tell_of_child(&self, offer: Offer, message: &SupervisorMessage) {
        let parent = self.pagers.get(&offer.pager);
        // Where it has ended, its closed connection will tell.
        let _ = parent.and_then(Pager::peer).map(|peer| peer.send(message));
    }

    /// What a pager is welcomed with.
    pub(super) fn welcome_with(
        &self,
        limit_bytes: u64,
        taken_from: Option<SessionReport>,
    ) -> Welcome {
        Welcome {
            limit_bytes,
            limit_bytes_max: self.parts.limit_bytes,
            server: self.parts.server.clone(),
            spill: self.parts.spill.clone(),
            reservation_bytes: RESERVATION_BYTES,
            share_arena: self.parts.private_server.is_some(),
            readahead_pages_max: READAHEAD_PAGES_MAX,
            pager_mark_bytes: self.parts.limit_bytes / 4 * 3,
            taken_from,
        }
    }
}
