//! Threads for requests that have to wait: for a disk, or until there is room in memory. A worker
//! hands such a request's peer over, whole, and goes on with the others; it gets the peer back as
//! soon as the request is served. So requests of one connection take effect in their order, and
//! other connections are not disturbed.
//!
//! ```text
//! worker ---- peer whose next request waits ---> [ queue ] ---> one of these threads
//!    ^                                                             |
//!    +------------------------ its mailbox <----------------------+
//! ```

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::peer::Peer;
use crate::worker::{Letter, Shared};

/// So many requests wait at the same time; more queue up. One disk gains nothing from more, and one
/// that does not answer takes at most these.
pub(crate) const PATIENT_THREADS: usize = 8;

/// Peers that are to be served where they may wait. Bounded by the limit on connections.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    queue: Mutex<Queue>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// With the worker that each goes back to.
    peers: VecDeque<(Box<Peer>, usize)>,
    is_over: bool,
}

impl Patience {
    /// Takes a peer over.
    pub(crate) fn push(&self, peer: Box<Peer>, worker: usize) {
        self.queue().peers.push_back((peer, worker));
        self.arrived.notify_one();
    }

    /// Ends [`serve`] on all threads.
    pub(crate) fn stop(&self) {
        self.queue().is_over = true;
        self.arrived.notify_all();
    }

    /// Lets [`serve`] begin anew; returns who still waits.
    pub(crate) fn start_over(&self) -> Vec<(Box<Peer>, usize)> {
        let mut queue = self.queue();
        queue.is_over = false;
        queue.peers.drain(..).collect()
    }

    /// The next peer, unless all is over.
    fn next(&self) -> Option<(Box<Peer>, usize)> {
        let mut queue = self.queue();
        loop {
            if queue.is_over {
                return None;
            }
            match queue.peers.pop_front() {
                Some(peer) => return Some(peer),
                None => queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves peers that wait, until [`Patience::stop`].
pub(crate) fn serve(shared: &Shared) {
    while let Some((mut peer, worker)) = shared.patience.next() {
        let result = peer.serve_patiently(&shared.engine, shared.now());
        shared.mailboxes[worker].post(Letter::Back(peer, result.err()));
    }
}
