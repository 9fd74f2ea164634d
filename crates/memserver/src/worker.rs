//! A thread that serves connections: waits, then performs. Decides nothing about requests.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farmem_region::Nanos;
use farmem_transport::{Listener, Passage, Socket};
use rustix::event::epoll;
use rustix::event::{Timespec, epoll::EventData};

use crate::counters::{DropReason, count};
use crate::engine::Engine;
use crate::log::{LogLevel, LogLine, RateLimitedLog};
use crate::patience::Patience;
use crate::peer::Peer;
use crate::seat::Seat;
use crate::server::event;

/// Events taken from the kernel at a time.
const EVENTS_MAX: usize = 64;
/// How often time-outs are looked at while there are any. A hundredth of the shortest one that
/// matters to people.
const TICK: Duration = Duration::from_millis(100);
/// Connections that are polled between two requests; of more, the kernel keeps track better.
const POLLED_MAX: usize = 4;
/// Rounds of polling between two looks at everything else.
const ROUNDS_PER_LOOK: u32 = 32;
/// How long is polled between two offers of the processor to others: an offer costs as much as some
/// looks, and what arrives meanwhile waits.
const OFFER_PERIOD: Duration = Duration::from_micros(8);
/// The shortest time worth polling for: less than a system call finds nothing.
const POLL_LEAST: Duration = Duration::from_micros(5);

const STOP: u64 = u64::MAX;
const MAIL: u64 = u64::MAX - 1;
/// Listeners are numbered downward from here, connections upward from 0.
const LISTENER: u64 = u64::MAX - 2;

/// What the workers of a server share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) mailboxes: Vec<Mailbox>,
    pub(crate) patience: Patience,
    /// Readable once all threads are to end.
    pub(crate) stop: OwnedFd,
    /// Why they are.
    pub(crate) purpose: Mutex<Purpose>,
    pub(crate) log: RateLimitedLog,
    pub(crate) began: Instant,
}

impl Shared {
    /// Closes all connections that nobody serves any more, once all threads have ended.
    pub(crate) fn close_left(&self) {
        let mut left = self.patience.start_over();
        for (worker, mailbox) in self.mailboxes.iter().enumerate() {
            for letter in mailbox.take() {
                left.push(match letter {
                    Letter::New(socket) => {
                        (Box::new(Peer::new(Box::new(socket), &self.engine, self.now())), worker)
                    }
                    Letter::Back(peer, _) => (peer, worker),
                });
            }
        }
        for (peer, worker) in left {
            self.close(peer, worker);
        }
    }

    /// Closes a connection of a worker.
    fn close(&self, peer: Box<Peer>, worker: usize) {
        peer.close(&self.engine, self.now());
        self.engine.counters.connections.fetch_sub(1, Ordering::Relaxed);
        self.mailboxes[worker].connections.fetch_sub(1, Ordering::Relaxed);
    }

    /// Since the server began.
    pub(crate) fn now(&self) -> Nanos {
        let nanos = self.began.elapsed().as_nanos();
        Nanos::new(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// What is to come of a server.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// It is to serve.
    Serve,
    /// It is to serve, and somebody is about to ask for another process to do so.
    Prepare,
    /// Another process is to serve.
    HandOver(Passage),
    /// It is to end.
    Stop,
}

/// Connections handed to a worker. Bounded by the limit on connections.
#[derive(Debug)]
pub(crate) struct Mailbox {
    event: OwnedFd,
    letters: Mutex<Vec<Letter>>,
    /// Connections of the worker, those in the mailbox and those that wait elsewhere included.
    connections: AtomicUsize,
}

/// What is handed to a worker.
#[derive(Debug)]
pub(crate) enum Letter {
    /// A connection that was accepted.
    New(Socket),
    /// A peer of its own that has been served elsewhere, and why it is to be dropped if it is.
    Back(Box<Peer>, Option<DropReason>),
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Self> {
        let (letters, connections) = (Mutex::default(), AtomicUsize::new(0));
        Ok(Self { event: event()?, letters, connections })
    }

    pub(crate) fn post(&self, letter: Letter) {
        self.letters.lock().unwrap_or_else(PoisonError::into_inner).push(letter);
        // The counter cannot overflow, so this cannot fail.
        let _ = rustix::io::write(&self.event, &1u64.to_le_bytes());
    }

    fn take(&self) -> Vec<Letter> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        std::mem::take(&mut self.letters.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// One thread's connections.
#[derive(Debug)]
pub(crate) struct Worker {
    shared: Arc<Shared>,
    index: usize,
    listeners: Arc<Vec<Listener>>,
    /// Listeners that rest because the kernel ran out of descriptors.
    resting: Vec<usize>,
    epoll: OwnedFd,
    peers: Vec<Option<Watched>>,
    vacant: Vec<usize>,
    /// Peers that sent something just now, at most [`POLLED_MAX`]: worth polling.
    active: Vec<usize>,
    polling: Polling,
    seat: Seat,
    poll_until: Instant,
    /// When the processor was last offered to others while polling.
    offered: Instant,
    next_tick: Option<Instant>,
}

/// A peer, and what the kernel has been told to watch.
#[derive(Debug)]
struct Watched {
    peer: Box<Peer>,
    interest: epoll::EventFlags,
}

/// How long to poll before sleeping: grows while a sleep turns out to have been shorter than
/// polling could have been, and shrinks when it was longer.
#[derive(Debug)]
struct Polling {
    limit: Duration,
    current: Duration,
}

impl Polling {
    fn slept(&mut self, time: Duration) {
        if time <= self.limit {
            self.current = (self.current * 2).clamp(POLL_LEAST, self.limit.max(POLL_LEAST));
        } else {
            self.current /= 2;
        }
    }

    fn time(&self) -> Duration {
        if self.current < POLL_LEAST { Duration::ZERO } else { self.current.min(self.limit) }
    }
}

impl Worker {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        index: usize,
        listeners: Arc<Vec<Listener>>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |fd: std::os::fd::BorrowedFd<'_>, data| {
            epoll::add(&epoll, fd, EventData::new_u64(data), epoll::EventFlags::IN)
        };
        watch(shared.stop.as_fd(), STOP)?;
        watch(shared.mailboxes[index].event.as_fd(), MAIL)?;
        for (listener, data) in listeners.iter().zip((0..=LISTENER).rev()) {
            watch(listener.descriptor(), data)?;
        }
        let limit = shared.engine.config.spin;
        // Sessions of a former process may time out though nobody ever comes.
        let next_tick = shared.engine.has_orphans().then(Instant::now);
        Ok(Self {
            shared: Arc::clone(shared),
            index,
            listeners,
            resting: Vec::new(),
            epoll,
            peers: Vec::new(),
            vacant: Vec::new(),
            active: Vec::new(),
            polling: Polling { limit, current: limit },
            seat: Seat::new(),
            poll_until: Instant::now(),
            offered: Instant::now(),
            next_tick,
        })
    }

    /// Serves until the server is stopped.
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut events = [const { MaybeUninit::uninit() }; EVENTS_MAX];
        loop {
            let wait = if self.poll() { Some(Duration::ZERO) } else { self.time_to_tick() };
            let began = Instant::now();
            let timeout = wait.map(|wait| Timespec {
                tv_sec: wait.as_secs().cast_signed(),
                tv_nsec: wait.subsec_nanos().into(),
            });
            let ready = match epoll::wait(&self.epoll, &mut events[..], timeout.as_ref()) {
                Ok((ready, _)) => ready,
                Err(rustix::io::Errno::INTR) => &mut [],
                Err(errno) => return Err(errno.into()),
            };
            if wait != Some(Duration::ZERO) && !ready.is_empty() {
                let slept = began.elapsed();
                self.polling.slept(slept);
                if slept >= TICK {
                    self.seat.rest();
                }
            }
            for event in ready {
                match event.data.u64() {
                    STOP => {
                        self.close_all();
                        return Ok(());
                    }
                    MAIL => self.take_mail(),
                    data if data > LISTENER - 1024 => self.accept((LISTENER - data) as usize),
                    data => self.serve(data as usize),
                }
            }
            self.tick();
        }
    }

    /// Polls the peers that were active just now; returns whether to go on with that after a
    /// look at everything else.
    fn poll(&mut self) -> bool {
        for _ in 0..ROUNDS_PER_LOOK {
            let now = Instant::now();
            if now >= self.poll_until {
                self.active.clear();
            }
            if self.active.is_empty() {
                return false;
            }
            // A peer that is dropped leaves the list.
            let mut at = 0;
            while let Some(index) = self.active.get(at) {
                self.serve_quietly(*index);
                at += 1;
            }
            if now.duration_since(self.offered) >= OFFER_PERIOD {
                // Another thread of this processor, maybe the client, may have something to do.
                std::thread::yield_now();
                self.offered = Instant::now();
            }
        }
        true
    }

    fn now(&self) -> Nanos {
        self.shared.now()
    }

    /// Serves a peer that the kernel reported.
    fn serve(&mut self, index: usize) {
        if self.serve_quietly(index) && !self.active.contains(&index) {
            self.active.push(index);
            if self.active.len() > POLLED_MAX {
                self.active.clear();
            }
        }
    }

    /// Serves a peer; returns whether it had sent something.
    fn serve_quietly(&mut self, index: usize) -> bool {
        let now = self.now();
        let Some(Some(watched)) = self.peers.get_mut(index) else {
            return false;
        };
        match watched.peer.serve(&self.shared.engine, now) {
            Ok(received) => {
                if received {
                    let time = self.polling.time();
                    self.poll_until = Instant::now() + time;
                    if !time.is_zero() {
                        self.seat.leave_to(watched.peer.connection());
                    }
                }
                let waits = watched.peer.waits();
                if received && (watched.peer.is_watched() || self.shared.engine.has_surplus()) {
                    self.expect_tick();
                }
                if waits {
                    self.hand_over(index);
                } else {
                    self.watch_again(index);
                }
                received
            }
            Err(reason) => {
                self.drop_peer(index, &reason);
                false
            }
        }
    }

    /// Tells the kernel what to watch, if that has changed.
    fn watch_again(&mut self, index: usize) {
        let Some(Some(watched)) = self.peers.get_mut(index) else {
            return;
        };
        let mut interest = epoll::EventFlags::empty();
        interest.set(epoll::EventFlags::IN, !watched.peer.is_full(&self.shared.engine));
        interest.set(epoll::EventFlags::OUT, watched.peer.wants_write());
        if interest == watched.interest {
            return;
        }
        watched.interest = interest;
        let data = EventData::new_u64(index as u64);
        let descriptor = watched.peer.connection().descriptor();
        if let Err(errno) = epoll::modify(&self.epoll, descriptor, data, interest) {
            self.drop_peer(index, &DropReason::Broken(errno.into()));
        }
    }

    /// Has a peer's next request served where it may wait.
    fn hand_over(&mut self, index: usize) {
        if let Some(peer) = self.take_peer(index) {
            // Where it waits nobody looks at what the kernel says of it. This fails for no
            // descriptor that is watched.
            let _ = epoll::delete(&self.epoll, peer.connection().descriptor());
            self.shared.patience.push(peer, self.index);
        }
    }

    /// Takes a peer off the lists.
    fn take_peer(&mut self, index: usize) -> Option<Box<Peer>> {
        let watched = self.peers[index].take()?;
        self.active.retain(|active| *active != index);
        self.vacant.push(index);
        Some(watched.peer)
    }

    fn drop_peer(&mut self, index: usize, reason: &DropReason) {
        if let Some(peer) = self.take_peer(index) {
            self.end_peer(peer, reason);
        }
    }

    fn end_peer(&mut self, peer: Box<Peer>, reason: &DropReason) {
        reason.count(&self.shared.engine.counters);
        if reason.is_worth_a_line() {
            let name = peer.name();
            let message = format_args!("dropped a client ({name}): {reason}");
            let line = LogLine::new(LogLevel::Warning, "client_dropped", message);
            self.shared.log.line(&line.with("reason", reason.name()).with("peer", name));
        }
        self.close(peer);
    }

    fn close(&mut self, peer: Box<Peer>) {
        self.shared.close(peer, self.index);
        // A session may have lost its last connection.
        self.expect_tick();
    }

    fn close_all(&mut self) {
        for letter in self.shared.mailboxes[self.index].take() {
            match letter {
                Letter::New(socket) => self.close(self.peer(socket)),
                Letter::Back(peer, _) => self.close(peer),
            }
        }
        for watched in std::mem::take(&mut self.peers).into_iter().flatten() {
            self.close(watched.peer);
        }
    }

    fn accept(&mut self, listener: usize) {
        loop {
            match self.listeners[listener].accept() {
                Ok(Some(socket)) => self.place(socket),
                Ok(None) => return,
                Err(error) => {
                    let message = format_args!("cannot accept a client: {error}");
                    self.report("accept_failed", message, &error);
                    // It would be reported as ready all the time: until the next tick.
                    self.watch_listener(listener, epoll::EventFlags::empty());
                    self.resting.push(listener);
                    self.expect_tick();
                    return;
                }
            }
        }
    }

    fn watch_listener(&self, listener: usize, interest: epoll::EventFlags) {
        let data = EventData::new_u64(LISTENER - listener as u64);
        let descriptor = self.listeners[listener].descriptor();
        if let Err(errno) = epoll::modify(&self.epoll, descriptor, data, interest) {
            let message = format_args!("cannot watch a listener: {errno}");
            self.report("watch_failed", message, &errno);
        }
    }

    /// Logs that the kernel refused something.
    fn report(&self, event: &'static str, message: fmt::Arguments<'_>, error: &dyn fmt::Display) {
        let line = LogLine::new(LogLevel::Error, event, message);
        self.shared.log.line(&line.with("error", error.to_string()));
    }

    /// Hands a connection to the worker with the fewest.
    fn place(&mut self, socket: Socket) {
        let counters = &self.shared.engine.counters;
        let limit = self.shared.engine.config.limits.connections_max;
        if counters.connections.load(Ordering::Relaxed) >= limit as u64 {
            count(&counters.connections_refused, 1);
            let message = format_args!("refused a client: {limit} are connected");
            let line = LogLine::new(LogLevel::Warning, "client_refused", message);
            self.shared.log.line(&line.with("connections", limit as u64));
            return;
        }
        count(&counters.connections, 1);
        count(&counters.connections_accepted, 1);
        let load = |mailbox: &&Mailbox| mailbox.connections.load(Ordering::Relaxed);
        if let Some(mailbox) = self.shared.mailboxes.iter().min_by_key(load) {
            mailbox.connections.fetch_add(1, Ordering::Relaxed);
            mailbox.post(Letter::New(socket));
        }
    }

    fn take_mail(&mut self) {
        for letter in self.shared.mailboxes[self.index].take() {
            let peer = match letter {
                Letter::New(socket) => self.peer(socket),
                Letter::Back(peer, None) => peer,
                Letter::Back(peer, Some(reason)) => {
                    self.end_peer(peer, &reason);
                    continue;
                }
            };
            if let Some(index) = self.admit(peer) {
                // What it has sent meanwhile.
                self.serve(index);
            }
        }
    }

    fn peer(&self, socket: Socket) -> Box<Peer> {
        Box::new(Peer::new(Box::new(socket), &self.shared.engine, self.now()))
    }

    fn admit(&mut self, peer: Box<Peer>) -> Option<usize> {
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.peers.push(None);
            self.peers.len() - 1
        });
        let (data, interest) = (EventData::new_u64(index as u64), epoll::EventFlags::IN);
        let added = epoll::add(&self.epoll, peer.connection().descriptor(), data, interest);
        self.peers[index] = Some(Watched { peer, interest });
        if let Err(errno) = added {
            self.drop_peer(index, &DropReason::Broken(errno.into()));
            return None;
        }
        self.expect_tick();
        Some(index)
    }

    fn time_to_tick(&self) -> Option<Duration> {
        self.next_tick.map(|tick| tick.saturating_duration_since(Instant::now()))
    }

    fn expect_tick(&mut self) {
        self.next_tick.get_or_insert_with(|| Instant::now() + TICK);
    }

    /// Looks at everything that time changes, if it is time.
    fn tick(&mut self) {
        if self.next_tick.is_none_or(|tick| Instant::now() < tick) {
            return;
        }
        for listener in std::mem::take(&mut self.resting) {
            self.watch_listener(listener, epoll::EventFlags::IN);
        }
        let now = self.now();
        let mut more = false;
        for index in 0..self.peers.len() {
            let Some(watched) = &self.peers[index] else {
                continue;
            };
            match watched.peer.check_time(&self.shared.engine, now) {
                Ok(()) => {
                    more |= watched.peer.is_watched();
                    if watched.peer.is_throttled() {
                        self.serve_quietly(index);
                    }
                }
                Err(reason) => self.drop_peer(index, &reason),
            }
        }
        let log = &self.shared.log;
        self.shared.engine.end_orphans(now, |name, pages| {
            let message =
                format_args!("freed {pages} pages of {name}: no connection came back in time");
            let line = LogLine::new(LogLevel::Warning, "session_timed_out", message);
            log.line(&line.with("client", name).with("pages", pages));
        });
        more |= self.shared.engine.has_orphans() | self.give_back();
        self.next_tick = more.then(|| Instant::now() + TICK);
    }

    /// Gives free memory back to the system, some at a time; returns whether there is more.
    fn give_back(&self) -> bool {
        /// Half a gigabyte in each tick, a few milliseconds of work.
        const CHUNKS_PER_TICK: usize = 256;
        (0..CHUNKS_PER_TICK).all(|_| match self.shared.engine.give_back() {
            Ok(more) => more,
            Err(error) => {
                let message = format_args!("cannot give memory back: {error}");
                self.report("give_back_failed", message, &error);
                false
            }
        })
    }
}
