//! Keeps a worker that looks out for requests off the processor of the client that sends them.
//!
//! The kernel takes a client that waits for its answer for one that is about to sleep, and puts the worker
//! that it wakes on the client's own processor. A client that looks out for the answer does not
//! sleep: the two would take turns by the scheduler's clock, for as long as both look out.

use farmem_transport::Connection;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Requests between two looks: each is a system call, and processors change seldom.
const REQUESTS_PER_LOOK: u32 = 32;

/// Where a worker, which is the calling thread, may run.
#[derive(Debug)]
pub(crate) struct Seat {
    everywhere: CpuSet,
    /// The processor that it has left to a client.
    left: Option<usize>,
    requests: u32,
}

impl Seat {
    pub(crate) fn new() -> Self {
        Self { everywhere: sched_getaffinity(None).unwrap_or_default(), left: None, requests: 0 }
    }

    /// The peer has sent something, and it will be looked out for more.
    pub(crate) fn leave_to(&mut self, peer: &dyn Connection) {
        self.requests += 1;
        if self.requests < REQUESTS_PER_LOOK {
            return;
        }
        self.requests = 0;
        let Some(cpu) = peer.peer_processor().filter(|&cpu| cpu == sched_getcpu()) else { return };
        let mut others = self.everywhere;
        others.unset(cpu);
        if others.count() > 0 && sched_setaffinity(None, &others).is_ok() {
            self.left = Some(cpu);
        }
    }

    /// Nothing is looked out for any more.
    pub(crate) fn rest(&mut self) {
        if self.left.take().is_some() {
            let _ = sched_setaffinity(None, &self.everywhere);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, IoSliceMut};

    use farmem_transport::{Endpoint, Listener, Moved, Socket};

    use super::*;

    /// On a thread of its own, whose affinity nobody else sees.
    #[test]
    fn a_worker_leaves_its_clients_processor_and_may_return_to_it() {
        std::thread::spawn(|| {
            let mut seat = Seat::new();
            if seat.everywhere.count() < 2 {
                // With one processor there is nowhere to go.
                return;
            }
            let listener = Listener::bind(&Endpoint::Tcp("127.0.0.1:0".parse().unwrap())).unwrap();
            let mut client = Socket::connect(listener.endpoint()).unwrap();
            let mut server = loop {
                if let Some(server) = listener.accept().unwrap() {
                    break server;
                }
            };
            let here = sched_getcpu();
            let mut only = CpuSet::new();
            only.set(here);
            sched_setaffinity(None, &only).unwrap();
            client.send(&[IoSlice::new(b"a")]).unwrap();
            while server.receive(&mut [IoSliceMut::new(&mut [0])]).unwrap() != Moved::Bytes(1) {}
            for _ in 0..REQUESTS_PER_LOOK {
                assert_eq!(seat.left, None, "not at every request");
                seat.leave_to(&server);
            }
            assert_eq!(seat.left, Some(here));
            assert_ne!(sched_getcpu(), here);
            seat.rest();
            assert_eq!(sched_getaffinity(None).unwrap(), seat.everywhere);
        })
        .join()
        .unwrap();
    }
}
