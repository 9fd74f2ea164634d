//! The life of the pager: it meets the supervisor, opens a session, and turns until the program
//! ends.

use std::fs::File;
use std::io::Seek;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use farmem_client::ProgramStore;
use farmem_pager::{
    Config, Counts, Fatal, HandOver, Latency, LookOut, OwnMemory, Pager, Ready, Scope, SlotPolicy,
    SpaceId, Wait,
};
use farmem_region::{ByteCount, Epoch, Incarnation, Nanos, PAGE_SIZE, SessionId};
use farmem_remote::{RemoteConfig, SessionInfo, SessionKey};
use farmem_supervise::{
    Counter, Hello, Histogram, LinkError, Met, PROTOCOL_VERSION, PagerLink, PagerMessage,
    SessionReport, StatsLayout, StatsWriter, SupervisorMessage, Welcome, tell_unpaged,
};
use farmem_transport::Endpoint;
use farmem_vmem::{
    AddressRange, ProcessHandle, SharedWords, Uffd, be_real_time, shared_memory_bytes,
};
use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::fs::MemfdFlags;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::pause::{LOOK_MICROS, Pause};
use crate::runtime::{self, Arguments};
use crate::{sharers, warden};

/// The supervisor answers a call within this time, or the program goes on unpaged.
const LINK_TIMEOUT: Duration = Duration::from_secs(5);
/// How often statistics are published and the supervisor's messages are looked for while busy.
const PUBLISH_MICROS: u64 = 1_000;
/// Turns in a row that go for the next fault without a look at what else is ready: some 200 us.
const UNLOOKED_MAX: u32 = 16;
/// How often it is checked that the program still has this memory (it may have called exec).
const EXEC_CHECK_MICROS: u64 = 20_000;
/// How often it is checked, once the program has ended, that nobody else has its memory.
const SHARERS_MICROS: u64 = 10_000;
/// How often it is checked, once the supervisor has died, that forked children have ended.
const CHILD_END_PERIOD: Duration = Duration::from_millis(10);
/// How often a child that is handed over is looked at: its threads wait.
const LEAVING_MICROS: u64 = 200;
/// Stack of the thread that runs errands; a look at the pages of a window takes 4 KiB of it.
const ERRANDS_STACK_BYTES: usize = 64 << 10;
/// Stack of the thread that reads pages and takes fingerprints.
const PORTER_STACK_BYTES: usize = 64 << 10;
/// Pages moved out together that another thread looks at, at least: three quarters of a window.
const LENT_PAGES_MIN: usize = 192;
/// Largest local limit for which scratch windows are provided in proportion: beyond it the victim
/// buffer stays at its size for this limit.
const SCRATCH_LIMIT_BYTES_MAX: u64 = 64 << 30;

/// Why the pager has not started.
enum NotStarted {
    /// The kernel does not let this program be paged: nothing is out, and it goes on as it is.
    Unpaged(String),
    /// There is no memory server as the user wants it: the program is to be stopped.
    Stop(String),
}

impl From<String> for NotStarted {
    fn from(message: String) -> Self {
        Self::Stop(message)
    }
}

/// Why the pager ends.
enum End {
    /// The program has ended, or has another memory after exec.
    ProgramEnded,
    /// The supervisor has died.
    SupervisorDied,
    /// The supervisor was told why the program must be stopped, and stops it.
    Stop,
}

/// Serves the program until it ends.
#[expect(clippy::needless_pass_by_value, reason = "the start-up code hands it over")]
pub(crate) fn run(arguments: Arguments) -> ! {
    runtime::on_panic(tell_panic);
    let mut pause = Pause::begin(&arguments);
    let stats = SharedWords::new("farmem-stats", StatsLayout::WORDS).unwrap_or_else(|error| {
        pause.end();
        go_unpaged(&arguments, &format!("no page for its counts: {error}"))
    });
    // A pager whose program lives for a moment may never count anything: that is no lost count.
    let _ = StatsWriter::new(stats.words());
    let hello = Hello {
        version: PROTOCOL_VERSION,
        program_pid: arguments.program.as_raw_nonzero().get().unsigned_abs(),
        pager_pid: std::process::id(),
        name: program_name(&arguments),
    };
    let is_own = |uffd: BorrowedFd<'_>| {
        uffd.try_clone_to_owned().is_ok_and(|uffd| Uffd::from_fd(uffd).is_own())
    };
    let called = PagerLink::connect_while(
        &arguments.socket,
        &hello,
        stats.as_fd(),
        LINK_TIMEOUT,
        &is_own,
        &mut || pause.step(true),
    );
    let (link, met) = match called {
        Ok(met) => met,
        // Nothing of the program is out yet: it goes on as it is.
        Err(LinkError::NoWelcome) => {
            pause.end();
            go_unpaged(&arguments, "`farmem run` did not answer its pager in time")
        }
        Err(_) => std::process::exit(0),
    };
    let program = program_handle(&arguments);
    let end = match Service::start(&arguments, link, met, &stats, &mut pause) {
        Ok(service) => service.serve(&arguments, &program, pause),
        Err((link, _)) if nobody_has(arguments.program_pidfd, arguments.statm) => {
            let _ = link.send(&PagerMessage::Bye, &[]);
            End::ProgramEnded
        }
        Err((link, NotStarted::Unpaged(message))) => {
            // It goes on unpaged, like a program that has been refused.
            let program_pid = hello.program_pid;
            let _ = link.send(&PagerMessage::Unpaged { program_pid, message }, &[]);
            End::Stop
        }
        Err((link, NotStarted::Stop(message))) => stop(&link, &message),
    };
    if let End::SupervisorDied = end {
        // Without it nobody keeps the program's faults waiting should this process die as well.
        program.kill();
    }
    std::process::exit(0)
}

/// Ends before anything is out, and tells the supervisor, which believes who is there when it listens.
fn go_unpaged(arguments: &Arguments, message: &str) -> ! {
    let program = arguments.program.as_raw_nonzero().get().unsigned_abs();
    if let Ok(told) = tell_unpaged(&arguments.socket, program, message, LINK_TIMEOUT) {
        let ends = [told.as_fd(), arguments.program_pidfd];
        let mut ends = ends.map(|end| PollFd::from_borrowed_fd(end, PollFlags::IN));
        let _ = poll(&mut ends, None);
    }
    std::process::exit(0)
}

/// Where a panic is told.
static SUPERVISOR: OnceLock<PagerLink> = OnceLock::new();

fn tell_panic(message: &str) {
    let Some(link) = SUPERVISOR.get() else { return };
    let fatal = PagerMessage::Fatal {
        message: format!("the pager failed: {message}; please report this"),
        exit_code: 125,
    };
    let _ = link.send(&fatal, &[]);
}

fn program_name(arguments: &Arguments) -> String {
    let path = format!("/proc/{}/comm", arguments.program.as_raw_nonzero());
    std::fs::read_to_string(path).map_or_else(|_| "?".to_owned(), |name| name.trim().to_owned())
}

fn program_handle(arguments: &Arguments) -> ProcessHandle {
    let fd = arguments.program_pidfd.try_clone_to_owned();
    let fd = fd.unwrap_or_else(|_| std::process::exit(125));
    ProcessHandle::from_parts(arguments.program, fd)
}

fn has_ended(program: BorrowedFd<'_>) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&program, PollFlags::IN)], Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// Whether the program has ended and left its memory to nobody. If that cannot be told somebody may have it.
fn nobody_has(program: BorrowedFd<'_>, statm: BorrowedFd<'_>) -> bool {
    has_ended(program) && sharers::exist(statm).is_ok_and(|exist| !exist)
}

fn stop(link: &PagerLink, message: &str) -> End {
    let fatal = PagerMessage::Fatal { message: message.to_owned(), exit_code: 125 };
    match link.send(&fatal, &[]) {
        Ok(()) => End::Stop,
        Err(_) => End::SupervisorDied,
    }
}

/// The pager at work.
struct Service<'a> {
    pager: Pager<ProgramStore>,
    link: PagerLink,
    stats: StatsWriter<'a>,
    waiter: Waiter,
    program: BorrowedFd<'static>,
    statm: BorrowedFd<'static>,
    /// The program has ended, or has another memory after exec.
    program_ended: bool,
    /// When to look next whether somebody else has the memory that it had.
    next_sharers: Nanos,
    /// The forked children that the supervisor knows of.
    children: Vec<SpaceId>,
    /// Of these, those that are being handed over to pagers of their own.
    leaving: Vec<SpaceId>,
    /// Turns in a row without a look at what else is ready.
    unlooked: u32,
    look_out: LookOut,
    next_publish: Nanos,
    next_exec_check: Nanos,
    limit_bytes: u64,
    /// Shared memory when it was last looked at, and the most of it.
    shared_bytes: u64,
    shared_bytes_peak: u64,
}

impl<'a> Service<'a> {
    fn start(
        arguments: &Arguments,
        link: PagerLink,
        met: Met,
        stats: &'a SharedWords,
        pause: &mut Pause,
    ) -> Result<Self, (PagerLink, NotStarted)> {
        let limit_bytes = met.welcome.limit_bytes;
        match Self::prepare(arguments, &link, met, pause) {
            Ok((pager, waiter)) => Ok(Self {
                look_out: LookOut::new(pager.memory().pulls()),
                pager,
                link,
                stats: StatsWriter::new(stats.words()),
                waiter,
                program: arguments.program_pidfd,
                statm: arguments.statm,
                program_ended: false,
                next_sharers: Nanos::new(0),
                children: Vec::new(),
                leaving: Vec::new(),
                unlooked: 0,
                next_publish: Nanos::new(0),
                next_exec_check: Nanos::new(0),
                limit_bytes,
                shared_bytes: 0,
                shared_bytes_peak: 0,
            }),
            Err(reason) => Err((link, reason)),
        }
    }

    fn prepare(
        arguments: &Arguments,
        link: &PagerLink,
        met: Met,
        pause: &mut Pause,
    ) -> Result<(Pager<ProgramStore>, Waiter), NotStarted> {
        let Met { welcome, inherited } = met;
        let last_words = link.duplicate().map_err(|error| error.to_string())?;
        let _ = SUPERVISOR.set(last_words);
        let windows = windows_for(welcome.limit_bytes_max);
        // A child of a program that has given its privileges up may not have one.
        let (opened, legacy) = match inherited {
            Some((uffd, file)) => match open_soon(&welcome, welcome.taken_from.as_ref(), pause) {
                Ok(opened) => (Some(opened), Some((Uffd::from_fd(uffd), File::from(file)))),
                // There is no room for another region as large. The parent's pager goes on.
                Err(_) => {
                    link.send(&PagerMessage::Declined, &[]).map_err(|error| error.to_string())?;
                    (None, None)
                }
            },
            None => (None, None),
        };
        let (uffd, legacy) = legacy.unzip();
        let memory = match uffd {
            Some(uffd) => OwnMemory::inheriting(arguments.program, windows, owned_ranges, uffd),
            None => OwnMemory::new(arguments.program, windows, owned_ranges),
        };
        let mut memory = memory.map_err(|error| NotStarted::Unpaged(error.to_string()))?;
        memory.pull_threads();
        let waiter = Waiter::for_program(arguments, link, memory.uffd());
        let waiter =
            waiter.map_err(|error| NotStarted::Unpaged(format!("epoll fails: {error}")))?;
        let (store, session) = opened.map_or_else(|| open_soon(&welcome, None, pause), Ok)?;
        let (place, secret) = memory.mark();
        link.send(&PagerMessage::Marked { place, secret }, &[])
            .and_then(|()| link.send_armed(memory.uffd().as_fd()))
            .and_then(|()| link.send(&PagerMessage::Session(report(&welcome, &session)), &[]))
            .map_err(|error| error.to_string())?;
        let mut secret = [0; 192];
        rustix::rand::getrandom(&mut secret[..], rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| format!("the system gives no random numbers: {errno}"))?;
        let config = Config {
            scope: Scope::Process,
            limit_bytes: welcome.limit_bytes,
            readahead_pages_max: welcome.readahead_pages_max,
            secret,
            region_pages: session.pages,
            slots: SlotPolicy::Allocated,
            // Larger ones have a watcher that becomes their pager.
            lent_pages_min: LENT_PAGES_MIN,
            zeros_are_absent: true,
            heir_mark_bytes: welcome.pager_mark_bytes,
        };
        warden::watch(&mut memory, waiter.epoll.as_raw_fd());
        start_threads(&memory, &waiter);
        let mut pager = Pager::new(&config, memory, store);
        if let Some(mut legacy) = legacy {
            pager.take_over(&mut legacy).map_err(|error| {
                NotStarted::Stop(format!("what its parent had out cannot be read: {error}"))
            })?;
        }
        Ok((pager, waiter))
    }

    fn serve(mut self, arguments: &Arguments, program: &ProcessHandle, mut pause: Pause) -> End {
        let mut ready = Ready::ALL;
        let end = loop {
            let mut wait = match self.pager.turn(ready) {
                Ok(wait) => wait,
                Err(fatal) => break self.stop(&fatal),
            };
            let now = wait.now;
            if pause.is_on() {
                pause.step(self.pager.exceeds_limit());
                wait.deadline = wait.deadline.min(now.plus_micros(LOOK_MICROS));
            }
            if now >= self.next_publish {
                self.next_publish = now.plus_micros(PUBLISH_MICROS);
                self.publish();
            }
            if now >= self.next_exec_check {
                self.next_exec_check = now.plus_micros(EXEC_CHECK_MICROS);
                let same = runtime::has_this_memory(arguments.program, arguments.statm);
                self.program_ended |= same.is_ok_and(|same| !same);
                self.measure_shared();
            }
            // Forked children, and who shares the memory, may have pages that only this process can bring.
            if self.program_ended && self.pager.memory().children().is_empty() {
                if self.nobody_shares(now) {
                    break End::ProgramEnded;
                }
                wait.deadline = wait.deadline.min(self.next_sharers);
            }
            match self.wait(wait, now) {
                Ok(next) => ready = next,
                Err(end) => break end,
            }
        };
        self.publish();
        if let End::SupervisorDied = end {
            self.keep_faults_waiting(program);
        }
        if !matches!(end, End::Stop) {
            // The supervisor ends the session if this fails.
            let _ = self.pager.into_store().disconnect();
            let _ = self.link.send(&PagerMessage::Bye, &[]);
        }
        end
    }

    /// Whether the program that has left its memory has left it to nobody, as far as was looked.
    fn nobody_shares(&mut self, now: Nanos) -> bool {
        if now < self.next_sharers {
            return false;
        }
        self.next_sharers = now.plus_micros(SHARERS_MICROS);
        sharers::exist(self.statm).is_ok_and(|exist| !exist)
    }

    /// Nobody else holds the userfaultfds any more, and when the last holder closes them the kernel
    /// hands out zero pages: first the program dies, whoever shares its memory, and forked children by
    /// their own watchers.
    fn keep_faults_waiting(&self, program: &ProcessHandle) {
        program.kill();
        let memory = self.pager.memory();
        let is_shared = || sharers::kill(self.statm).unwrap_or(false);
        while is_shared() || memory.children().iter().any(|&(space, _)| memory.lives(space)) {
            std::thread::sleep(CHILD_END_PERIOD);
        }
    }

    fn stop(&mut self, fatal: &Fatal) -> End {
        // A child that was forked in this very turn: the supervisor keeps its faults waiting.
        let _ = self.follow_children();
        // What fails because the program has ended meanwhile is no failure.
        if self.children.is_empty() && nobody_has(self.program, self.statm) {
            return End::ProgramEnded;
        }
        self.publish();
        stop(&self.link, &fatal.to_string())
    }

    fn wait(&mut self, mut wait: Wait, now: Nanos) -> Result<Ready, End> {
        self.follow_children()?;
        self.hand_over()?;
        if wait.more && self.unlooked < UNLOOKED_MAX {
            self.unlooked += 1;
            return Ok(Ready { events: true, children: true, store: false, slept: false });
        }
        self.unlooked = 0;
        self.waiter.follow_store(self.pager.store().descriptor(), wait.store_writable);
        let woken = if wait.again {
            self.waiter.look()
        } else {
            if !self.leaving.is_empty() {
                wait.deadline = wait.deadline.min(now.plus_micros(LEAVING_MICROS));
            }
            let waiter = &mut self.waiter;
            let clock = Pager::<ProgramStore>::now;
            let seen = self.look_out.run(&wait, clock, || waiter.look_for_any());
            seen.unwrap_or_else(|| waiter.wait(now, wait.deadline, self.pager.yields()))
        };
        if woken.program {
            self.program_ended = true;
            self.waiter.forget(self.program);
            // A fork that was its last deed has been reported.
            return Ok(Ready::ALL);
        }
        if woken.link {
            self.read_link()?;
        }
        Ok(woken.ready)
    }

    /// Waits for the faults of forked children too, and lets the supervisor hold their userfaultfds:
    /// were this process to die, theirs would otherwise close and the kernel hand out zero pages.
    fn follow_children(&mut self) -> Result<(), End> {
        let children = self.pager.memory().children();
        if children.iter().map(|(space, _)| space).eq(&self.children) {
            return Ok(());
        }
        let key = |space: SpaceId| u64::from(space.0);
        for (space, uffd) in children.iter().filter(|(space, _)| !self.children.contains(space)) {
            // Without it the child's faults are still seen with the next ones of the program.
            let _ = self.waiter.watch(uffd.as_fd(), Source::Children);
            let message = PagerMessage::ForkChild { key: key(*space) };
            self.link.send(&message, &[uffd.as_fd()]).map_err(|_| End::SupervisorDied)?;
        }
        let lives = |gone: &SpaceId| children.iter().any(|(space, _)| space == gone);
        for &gone in self.children.iter().filter(|space| !lives(space)) {
            let message = PagerMessage::ForkChildGone { key: key(gone) };
            self.link.send(&message, &[]).map_err(|_| End::SupervisorDied)?;
        }
        self.children = children.iter().map(|&(space, _)| space).collect();
        Ok(())
    }

    fn read_link(&mut self) -> Result<(), End> {
        loop {
            match self.link.try_receive() {
                Ok(Some(SupervisorMessage::Limit { bytes })) => {
                    self.limit_bytes = bytes;
                    self.pager.set_limit(bytes);
                }
                Ok(Some(SupervisorMessage::HandOver { key, program_pid })) => {
                    let child = space_of(key);
                    self.pager.begin_hand_over(child, program_pid);
                    self.leaving.push(child);
                }
                Ok(Some(SupervisorMessage::Taken { key })) => self.pager.let_go(space_of(key)),
                Ok(Some(SupervisorMessage::Returned { key })) => self.serve_again(space_of(key)),
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(_) => return Err(End::SupervisorDied),
            }
        }
    }

    /// Goes on with handing children over.
    fn hand_over(&mut self) -> Result<(), End> {
        for child in std::mem::take(&mut self.leaving) {
            let written = rustix::fs::memfd_create("farmem-legacy", MemfdFlags::CLOEXEC)
                .map_err(std::io::Error::from)
                .and_then(|file| {
                    let mut file = File::from(file);
                    let state = self.pager.hand_over(child, &mut file)?;
                    file.rewind()?;
                    Ok((state, file))
                });
            let key = u64::from(child.0);
            let sent = match written {
                Ok((HandOver::NotYet, _)) => {
                    self.leaving.push(child);
                    continue;
                }
                Ok((HandOver::Done, file)) => {
                    let children = self.pager.memory().children();
                    if let Some((_, uffd)) = children.iter().find(|(space, _)| *space == child) {
                        self.waiter.forget(uffd.as_fd());
                    }
                    self.link.send(&PagerMessage::HandedOver { key }, &[file.as_fd()])
                }
                Ok((HandOver::NoChild, _)) | Err(_) => {
                    self.pager.serve_again(child);
                    self.link.send(&PagerMessage::Kept { key }, &[])
                }
            };
            sent.map_err(|_| End::SupervisorDied)?;
        }
        Ok(())
    }

    /// A child that was to be handed over stays.
    fn serve_again(&mut self, child: SpaceId) {
        self.leaving.retain(|&space| space != child);
        self.pager.serve_again(child);
        let children = self.pager.memory().children();
        if let Some((_, uffd)) = children.iter().find(|(space, _)| *space == child) {
            // It may be watched still.
            let _ = self.waiter.watch(uffd.as_fd(), Source::Children);
        }
    }

    /// Not with every publication: it is a long file to read.
    fn measure_shared(&mut self) {
        self.shared_bytes = shared_memory_bytes().unwrap_or(0);
        self.shared_bytes_peak = self.shared_bytes_peak.max(self.shared_bytes);
        self.stats.set(Counter::UnpageableSharedBytes, self.shared_bytes_peak);
    }

    fn publish(&mut self) {
        let counts = self.pager.counts();
        publish_counts(&self.stats, &counts);
        let files = (counts.shared_pages * PAGE_SIZE as u64).saturating_sub(self.shared_bytes);
        self.stats.set(Counter::UnpageableFileBytes, files);
        self.stats.set(Counter::LimitBytes, self.limit_bytes);
        self.stats.set(Counter::PagerBytes, runtime::heap_bytes() as u64);
        self.stats.set(Counter::Connections, 1);
        self.stats.set(Counter::Sessions, 1);
        let stats = &self.stats;
        self.pager.drain_samples(&mut |sample| {
            let histogram = match sample.latency {
                Latency::Fault => Histogram::Fault,
                Latency::Network => Histogram::Network,
                Latency::Server => Histogram::Server,
                Latency::Install => Histogram::Install,
            };
            stats.record(histogram, sample.nanos);
        });
    }
}

fn publish_counts(stats: &StatsWriter<'_>, counts: &Counts) {
    const PAGE: u64 = PAGE_SIZE as u64;
    for (counter, value) in [
        (Counter::ResidentBytes, counts.local_pages * PAGE),
        (Counter::LocalPeakBytes, counts.local_pages_peak * PAGE),
        (Counter::ExternalBytes, counts.external_pages * PAGE),
        (Counter::ExternalPeakBytes, counts.external_pages_peak * PAGE),
        (Counter::VictimPages, counts.victim_pages),
        (Counter::Faults, counts.faults),
        (Counter::FetchedPages, counts.fetched_pages),
        (Counter::ReadaheadPages, counts.readahead_pages),
        (Counter::ReadaheadHits, counts.readahead_hits),
        (Counter::EvictedPages, counts.evicted_pages),
        (Counter::WrittenPages, counts.written_pages),
        (Counter::VictimHits, counts.victim_hits),
        (Counter::ZeroPages, counts.zero_drops),
        (Counter::ZeroFilledPages, counts.zero_pages),
        (Counter::CleanDroppedPages, counts.clean_drops),
        (Counter::BusyPages, counts.busy_pages),
        (Counter::RemoveEvents, counts.removes),
        (Counter::RemapEvents, counts.remaps),
        (Counter::UnmapEvents, counts.unmaps),
        (Counter::ForkEvents, counts.forks),
        (Counter::UnpageableForeignBytes, counts.foreign_pages_peak * PAGE),
    ] {
        stats.set(counter, value);
    }
}

/// A child by the key that the supervisor knows it by.
fn space_of(key: u64) -> SpaceId {
    SpaceId(u32::try_from(key).unwrap_or(u32::MAX))
}

fn owned_ranges(each: &mut dyn FnMut(AddressRange)) {
    for range in runtime::owned_ranges() {
        each(AddressRange::new(range.start, range.end));
    }
}

/// Windows of the scratch area: the victim buffer's share of the limit six times over, because
/// windows moved out of sparse memory are mostly holes.
fn windows_for(limit_bytes: u64) -> usize {
    let pages = limit_bytes.min(SCRATCH_LIMIT_BYTES_MAX) >> 12;
    usize::try_from(pages / 16 / 256 * 6 + 64).unwrap_or(64)
}

/// Starts the pager's other threads. Without one of them its work is left undone, or the pager does it.
fn start_threads(memory: &OwnMemory, waiter: &Waiter) {
    let (errands, porter) = (memory.errands(), memory.porter());
    // Without the thread pages that a forked child has too stay in memory.
    let _ = runtime::spawn("farmem-errands", ERRANDS_STACK_BYTES, move || {
        be_real_time();
        errands.run(|| porter.ring());
    });
    let porter = memory.porter();
    if waiter.watch_edges(porter.bell(), Source::Bell).is_ok() {
        // Not real-time: it takes turns with the program, and what it has not begun the pager does.
        let _ = runtime::spawn("farmem-porter", PORTER_STACK_BYTES, move || porter.run());
    }
}

/// As [`open_store`]; threads of the program are held for as long as they may be, and not while a slow server
/// is waited for.
fn open_soon(
    welcome: &Welcome,
    of: Option<&SessionReport>,
    pause: &mut Pause,
) -> Result<(ProgramStore, SessionInfo), String> {
    if let Some(left) = pause.left() {
        let opened = open_store(welcome, of, Some(left));
        if opened.is_ok() || pause.left().is_none_or(|left| !left.is_zero()) {
            return opened;
        }
        // Should the server have made a session, it ends by itself.
        pause.end();
    }
    open_store(welcome, of, None)
}

/// Opens a session within a time, or the usual one; its region begins as a copy of the one `of`.
fn open_store(
    welcome: &Welcome,
    of: Option<&SessionReport>,
    within: Option<Duration>,
) -> Result<(ProgramStore, SessionInfo), String> {
    let endpoint: Endpoint = welcome
        .server
        .parse()
        .map_err(|error: farmem_transport::AddressError| error.to_string())?;
    let amount = ByteCount::new(welcome.reservation_bytes);
    let mut config = RemoteConfig::new(endpoint, "farmem run", amount);
    if let Some(within) = within {
        let micros = u64::try_from(within.as_micros()).unwrap_or(u64::MAX);
        config.timeouts.connect_us = config.timeouts.connect_us.min(micros);
    }
    config.share_arena = welcome.share_arena;
    config.dynamic = true;
    config.copy_of = of.map(|of| SessionKey {
        session: SessionId::new(of.session),
        token: of.token,
        epoch: Epoch::new(of.epoch),
        incarnation: Incarnation::new(of.incarnation),
    });
    let spill = welcome.spill.as_deref().map(Path::new);
    // What the server has not got is looked for on the disk.
    config.accept_partial = spill.is_some();
    ProgramStore::connect(config, spill, Pager::<ProgramStore>::now())
        .map_err(|error| error.to_string())
}

fn report(welcome: &Welcome, session: &SessionInfo) -> SessionReport {
    SessionReport {
        server: welcome.server.clone(),
        session: session.session.get(),
        token: session.token,
        epoch: session.epoch.get(),
        incarnation: session.incarnation.get(),
        region: session.region.get(),
        granted: session.granted.get(),
    }
}

/// What a descriptor means when it is ready.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Events = 1,
    Children,
    Store,
    Link,
    Program,
    Timer,
    /// Work has been done by another thread.
    Bell,
}

/// What has become ready.
struct Woken {
    ready: Ready,
    link: bool,
    program: bool,
}

/// Waits for everything at once, by epoll.
///
/// Deadlines come from a timer that is set only when one is earlier than what it is set for: a
/// time-out given to every wait would set and cancel the processor's timer each time, which costs
/// a virtual machine more than all else of a fault.
struct Waiter {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// When the timer goes off.
    alarm: Option<Nanos>,
    store: Option<(RawFd, bool)>,
    events: Vec<epoll::Event>,
}

impl Waiter {
    fn new() -> std::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        let waiter =
            Self { epoll, timer, alarm: None, store: None, events: Vec::with_capacity(16) };
        waiter.watch(waiter.timer.as_fd(), Source::Timer)?;
        Ok(waiter)
    }

    /// Waits for all that concerns a program. The supervisor's end is that of the link: the parent of this
    /// process may be a subreaper below it, whose end means nothing.
    fn for_program(arguments: &Arguments, link: &PagerLink, uffd: &Uffd) -> std::io::Result<Self> {
        let waiter = Self::new()?;
        waiter.watch(uffd.as_fd(), Source::Events)?;
        waiter.watch(link.fd(), Source::Link)?;
        waiter.watch(arguments.program_pidfd, Source::Program)?;
        Ok(waiter)
    }

    fn watch(&self, fd: BorrowedFd<'_>, source: Source) -> std::io::Result<()> {
        self.add(fd, source, epoll::EventFlags::IN)
    }

    /// Watches a descriptor that is never read: each time it becomes readable anew counts.
    fn watch_edges(&self, fd: BorrowedFd<'_>, source: Source) -> std::io::Result<()> {
        self.add(fd, source, epoll::EventFlags::IN | epoll::EventFlags::ET)
    }

    fn add(
        &self,
        fd: BorrowedFd<'_>,
        source: Source,
        flags: epoll::EventFlags,
    ) -> std::io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(source as u64), flags)?)
    }

    fn forget(&self, fd: BorrowedFd<'_>) {
        // Fails only if it is not watched.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Watches the store's descriptor, which changes when it reconnects. A closed descriptor
    /// leaves the set by itself.
    fn follow_store(&mut self, store: Option<BorrowedFd<'_>>, writable: bool) {
        let wanted = store.map(|fd| (fd.as_raw_fd(), writable));
        if wanted == self.store {
            return;
        }
        if let Some(fd) = store {
            let mut flags = epoll::EventFlags::IN;
            if writable {
                flags |= epoll::EventFlags::OUT;
            }
            let data = epoll::EventData::new_u64(Source::Store as u64);
            if epoll::modify(&self.epoll, fd, data, flags).is_err() {
                // Not in the set yet. Should it fail, the next turn's deadline polls the store.
                let _ = epoll::add(&self.epoll, fd, data, flags);
            }
        }
        self.store = wanted;
    }

    /// What is ready now.
    fn look(&mut self) -> Woken {
        self.collect(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
    }

    /// The same, if anything is.
    fn look_for_any(&mut self) -> Option<Woken> {
        let woken = self.look();
        (!self.events.is_empty()).then_some(woken)
    }

    /// Waits until something is ready or the deadline has come; perhaps for less.
    ///
    /// With `look_first` it is found out whether there was anything to wait for.
    fn wait(&mut self, now: Nanos, deadline: Nanos, look_first: bool) -> Woken {
        let nanos = deadline.since(now);
        if nanos == 0 || look_first {
            let woken = self.look();
            if nanos == 0 || !self.events.is_empty() {
                return woken;
            }
        }
        if self.alarm.is_none_or(|alarm| alarm <= now || deadline < alarm) {
            let value = Timespec {
                tv_sec: i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX),
                tv_nsec: (nanos % 1_000_000_000).cast_signed(),
            };
            let once =
                Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            // Setting it anew also takes back an expiry that was not read.
            let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
            self.alarm = Some(deadline);
        }
        let mut woken = self.collect(None);
        woken.ready.slept = true;
        woken
    }

    fn collect(&mut self, timeout: Option<&Timespec>) -> Woken {
        self.events.clear();
        let spare = rustix::buffer::spare_capacity(&mut self.events);
        // A signal or a full set of events only means another turn.
        let _ = epoll::wait(&self.epoll, spare, timeout);
        let is = |source: Source| self.events.iter().any(|e| e.data.u64() == source as u64);
        let woken = Woken {
            ready: Ready {
                events: is(Source::Events),
                children: is(Source::Children),
                store: is(Source::Store) || is(Source::Bell),
                slept: false,
            },
            link: is(Source::Link),
            program: is(Source::Program),
        };
        if is(Source::Timer) {
            let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            self.alarm = None;
        }
        woken
    }
}
