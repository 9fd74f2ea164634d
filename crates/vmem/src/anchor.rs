//! Keeps a pager and the threads that it wakes on one processor.
//!
//! A thread that is woken while its waker still runs is put on another, idle processor, whose
//! wake-up takes several times longer than the fault that the thread waited for; and its next fault
//! has to wake the pager from there. Two things keep it from there:
//!
//! * *Bringing*: for the moment of the wake-up the thread's set of processors is narrowed to the
//!   pager's own, then it is restored. The thread must not run in between, or it, and what it starts,
//!   could see the narrowed set: that takes real-time priority.
//! * *Yielding*: a processor on which nothing runs but tasks of the policy SCHED_IDLE counts as idle
//!   when the kernel looks for one (sched(7)). While the pager is of that policy, a thread that it
//!   wakes stays beside it and goes on at once. That spares two system calls and the price of
//!   real-time scheduling, 5 of 12 us a fault on a virtual machine. But any other task that wants the
//!   processor starves the pager: so somebody watches it, see [`Lifeline`].

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use rustix::thread::CpuSet;

/// A thread that is to go on at the pager's processor when it is woken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pull {
    /// Its number.
    pub thread: u32,
    /// It has most likely been put on another processor.
    pub strayed: bool,
}

/// See the module's text.
#[derive(Debug)]
pub struct Anchor {
    real_time: bool,
    /// Where the pager may run when it is not anchored.
    everywhere: CpuSet,
    /// Where it stays.
    here: Option<CpuSet>,
    pulls: u64,
    pulls_at_rest: u64,
    yielding: Option<Yielding>,
}

/// Threads brought in a row before the pager yields.
const BROUGHT_MIN: u32 = 16;
/// How long the pager does not yield after it was starved: others want the processor, and each
/// time costs the program some milliseconds. A short process that came by is gone after that.
const PAUSE_MIN: Duration = Duration::from_millis(16);
/// The same, at most, when it is starved again soon after each pause.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// A pager that has yielded for this long before it was starved has gained more, a quarter of the time, than the
/// four milliseconds that a starvation costs; its next pause is a short one then. So somebody who comes by
/// ten times a second, a monitor for example, does not keep it from yielding.
const PAYS_FROM: Duration = Duration::from_millis(40);
/// Threads woken in a row that need not be pulled, after which the pager yields no longer.
const LEFT_ALONE_MAX: u32 = 16;

#[derive(Debug)]
struct Yielding {
    lifeline: Arc<Lifeline>,
    /// Since when it yields.
    since: Option<Instant>,
    rescues: u32,
    starvations: u32,
    /// Threads brought since the last rescue.
    brought: u32,
    pauses: Pauses,
    left_alone: u32,
}

/// For how long a pager that was starved does not yield.
#[derive(Debug, Default)]
struct Pauses {
    /// For how long it has yielded since the last one, with interruptions.
    yielded: Duration,
    /// The last one.
    pause: Duration,
    until: Option<Instant>,
}

impl Pauses {
    /// The pager has yielded for a while.
    fn yielded(&mut self, during: Duration) {
        self.yielded += during;
    }

    /// The pager was starved at `now`.
    fn starved(&mut self, now: Instant) {
        let in_vain = std::mem::take(&mut self.yielded) < PAYS_FROM;
        self.pause = if in_vain { (self.pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) } else { PAUSE_MIN };
        self.until = Some(now + self.pause);
    }

    fn lasts(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

impl Yielding {
    /// The pager does not yield any more.
    fn ended(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.pauses.yielded(now.saturating_duration_since(since));
        }
    }

    /// Somebody has given the pager its priority back.
    fn rescued(&mut self) {
        self.rescues = self.lifeline.rescues.load(Ordering::Acquire);
        self.brought = 0;
        let rescued = self.lifeline.rescued_nanos.load(Ordering::Relaxed);
        // The pager may have slept since then.
        self.ended(self.lifeline.born + Duration::from_nanos(rescued));
        let starvations = self.lifeline.starvations.load(Ordering::Relaxed);
        if std::mem::replace(&mut self.starvations, starvations) == starvations {
            return;
        }
        self.pauses.starved(Instant::now());
    }
}

/// Between a pager that yields its processor and somebody with real-time priority who rescues it
/// when it starves.
#[derive(Debug)]
pub struct Lifeline {
    pager: Pid,
    /// Who rescues; woken whenever the pager begins to yield.
    holder: OnceLock<Thread>,
    turns: AtomicU64,
    rescues: AtomicU32,
    /// How many of them were from starvation.
    starvations: AtomicU32,
    born: Instant,
    /// When the last one was, in nanoseconds since then.
    rescued_nanos: AtomicU64,
}

impl Lifeline {
    /// The calling thread rescues from now on. It may park while the pager does not yield.
    pub fn hold(&self) {
        self.holder.get_or_init(std::thread::current);
    }

    /// How often the pager has turned.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }

    /// Whether the pager yields to everybody now.
    #[must_use]
    pub fn yields(&self) -> bool {
        // SAFETY: sched_getscheduler(2) takes a number and changes nothing.
        let policy = unsafe { libc::sched_getscheduler(self.pager.as_raw_nonzero().get()) };
        policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_IDLE
    }

    /// Gives the pager real-time priority again, because it has nothing to do or, if `starved`, has
    /// not been let do it.
    pub fn rescue(&self, starved: bool) {
        set_policy(Some(self.pager), libc::SCHED_FIFO, 1);
        let nanos = u64::try_from(self.born.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.rescued_nanos.store(nanos, Ordering::Relaxed);
        self.starvations.fetch_add(u32::from(starved), Ordering::Relaxed);
        self.rescues.fetch_add(1, Ordering::Release);
    }
}

/// Changes how a thread, or the calling one, is scheduled; what it starts does not inherit it.
fn set_policy(thread: Option<Pid>, policy: libc::c_int, priority: libc::c_int) -> bool {
    set_flagged_policy(thread, policy | libc::SCHED_RESET_ON_FORK, priority)
}

fn set_flagged_policy(thread: Option<Pid>, policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameter = libc::sched_param { sched_priority: priority };
    let thread = thread.map_or(0, |thread| thread.as_raw_nonzero().get());
    // SAFETY: sched_setscheduler(2) reads the parameter and changes the scheduling of one thread.
    unsafe { libc::sched_setscheduler(thread, policy, &raw const parameter) == 0 }
}

/// Gives the calling thread the lowest real-time priority, if the system lets it (`CAP_SYS_NICE` or
/// `RLIMIT_RTPRIO`), or else short turns; threads and processes that it starts do not inherit it.
pub fn be_real_time() -> bool {
    let granted = set_policy(None, libc::SCHED_FIFO, 1);
    if !granted {
        crate::slices::ask_for_short_ones(true);
    }
    granted
}

/// As [`be_real_time`], but what the thread starts inherits it. So programs that ask how their parent is
/// scheduled (`sched_getscheduler(2)`) see a policy that they know, without `SCHED_RESET_ON_FORK`.
pub fn be_real_time_with_heirs() -> bool {
    let granted = set_flagged_policy(None, libc::SCHED_FIFO, 1);
    if !granted {
        crate::slices::ask_for_short_ones(false);
    }
    granted
}

/// Runs `work` with ordinary priority, if the calling thread has a real-time one.
///
/// For calls that wait in the kernel for somebody who is not let run meanwhile: who reaps a process whose
/// files in /proc another one is just forgetting tries again and again until that one is through.
pub fn without_real_time<R>(work: impl FnOnce() -> R) -> R {
    // SAFETY: sched_getscheduler(2) takes a number and changes nothing.
    let policy = unsafe { libc::sched_getscheduler(0) };
    let is_real_time = policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_FIFO;
    if !is_real_time {
        return work();
    }
    let mut parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: sched_getparam(2) writes one parameter, which outlives the call.
    let known = unsafe { libc::sched_getparam(0, &raw mut parameter) } == 0;
    let priority = if known { parameter.sched_priority } else { 1 };
    // Who is not privileged may not take the flag back.
    set_flagged_policy(None, libc::SCHED_OTHER | (policy & libc::SCHED_RESET_ON_FORK), 0);
    let result = work();
    set_flagged_policy(None, policy, priority);
    result
}

/// Gives another thread of the pager the lowest real-time priority, if the system lets it, or takes it
/// back.
pub(crate) fn hurry(thread: Pid, hurries: bool) {
    if hurries {
        set_policy(Some(thread), libc::SCHED_FIFO, 1);
    } else {
        set_policy(Some(thread), libc::SCHED_OTHER, 0);
    }
}

impl Anchor {
    /// Gives the calling thread real-time priority, if the system lets it, and brings threads to
    /// its processor.
    #[must_use]
    pub fn real_time() -> Self {
        Self { real_time: be_real_time(), ..Self::none() }
    }

    /// Pulls nobody.
    #[must_use]
    pub fn none() -> Self {
        Self {
            real_time: false,
            everywhere: rustix::thread::sched_getaffinity(None).unwrap_or_default(),
            here: None,
            pulls: 0,
            pulls_at_rest: 0,
            yielding: None,
        }
    }

    /// Whether anybody is pulled.
    #[must_use]
    pub const fn pulls(&self) -> bool {
        self.real_time
    }

    /// From now on the pager, which is the calling thread, yields while it serves threads that
    /// fault fast. The caller sees to it that somebody watches the lifeline. `None` without
    /// real-time priority: nobody is pulled then.
    pub fn yield_from_now_on(&mut self) -> Option<Arc<Lifeline>> {
        if !self.real_time {
            return None;
        }
        let lifeline = Arc::new(Lifeline {
            pager: rustix::thread::gettid(),
            holder: OnceLock::new(),
            turns: AtomicU64::new(0),
            rescues: AtomicU32::new(0),
            starvations: AtomicU32::new(0),
            born: Instant::now(),
            rescued_nanos: AtomicU64::new(0),
        });
        self.yielding = Some(Yielding {
            lifeline: Arc::clone(&lifeline),
            since: None,
            rescues: 0,
            starvations: 0,
            brought: 0,
            pauses: Pauses::default(),
            left_alone: 0,
        });
        Some(lifeline)
    }

    /// To be called at every turn of the pager: it is alive.
    pub fn turned(&mut self) {
        let Some(yielding) = &mut self.yielding else { return };
        yielding.lifeline.turns.fetch_add(1, Ordering::Relaxed);
        if yielding.lifeline.rescues.load(Ordering::Acquire) != yielding.rescues {
            yielding.rescued();
        }
    }

    /// Whether the pager yields now: what it wakes may run before it.
    #[must_use]
    pub fn yields(&self) -> bool {
        self.yielding.as_ref().is_some_and(|yielding| yielding.since.is_some())
    }

    /// Runs `wake`, which wakes the waiting thread, such that the thread continues on the calling
    /// thread's processor; with `None` it just runs it.
    pub fn pull<R>(&mut self, pull: Option<Pull>, wake: impl FnOnce() -> R) -> R {
        let Some(pull) = pull.filter(|_| self.real_time) else {
            self.leave_alone();
            return wake();
        };
        self.pulls += 1;
        if let Some(yielding) = self.yielding.as_mut().filter(|one| one.since.is_some()) {
            yielding.left_alone = 0;
            if !pull.strayed {
                return wake();
            }
            self.stop_yielding();
        }
        let thread = i32::try_from(pull.thread).ok().and_then(Pid::from_raw);
        let Some((thread, (here, allowed))) = thread.and_then(|t| Some((t, self.prepare(t)?)))
        else {
            return wake();
        };
        let narrowed = rustix::thread::sched_setaffinity(Some(thread), &here).is_ok();
        let result = wake();
        if narrowed {
            // Fails only if the thread has ended.
            let _ = rustix::thread::sched_setaffinity(Some(thread), &allowed);
        }
        self.begin_yielding();
        result
    }

    /// Lets the pager run anywhere again if it has pulled nobody since the last call.
    pub fn rest(&mut self) {
        if self.pulls == self.pulls_at_rest && self.here.is_some() {
            self.stop_yielding();
            self.here = None;
            let _ = rustix::thread::sched_setaffinity(None, &self.everywhere);
        }
        self.pulls_at_rest = self.pulls;
    }

    fn leave_alone(&mut self) {
        let Some(yielding) = self.yielding.as_mut().filter(|one| one.since.is_some()) else {
            return;
        };
        yielding.left_alone += 1;
        if yielding.left_alone > LEFT_ALONE_MAX {
            self.stop_yielding();
        }
    }

    fn begin_yielding(&mut self) {
        let Some(yielding) = &mut self.yielding else { return };
        yielding.brought += 1;
        if yielding.brought < BROUGHT_MIN {
            return;
        }
        let now = Instant::now();
        if yielding.pauses.lasts(now) {
            return;
        }
        let Some(holder) = yielding.lifeline.holder.get() else { return };
        holder.unpark();
        // The thread that was brought goes on at this moment.
        yielding.since = Some(now);
        yielding.left_alone = 0;
        if !set_policy(None, libc::SCHED_IDLE, 0) {
            yielding.since = None;
        }
    }

    fn stop_yielding(&mut self) {
        let Some(yielding) = self.yielding.as_mut().filter(|one| one.since.is_some()) else {
            return;
        };
        yielding.ended(Instant::now());
        set_policy(None, libc::SCHED_FIFO, 1);
    }

    /// Anchors the pager; returns its place and the thread's own set if that has it and more.
    fn prepare(&mut self, thread: Pid) -> Option<(CpuSet, CpuSet)> {
        let here = match self.here {
            Some(here) => here,
            None => {
                let mut here = CpuSet::new();
                here.set(rustix::thread::sched_getcpu());
                rustix::thread::sched_setaffinity(None, &here).ok()?;
                *self.here.insert(here)
            }
        };
        // Read each time: what the thread has chosen for itself meanwhile is to be restored.
        let allowed = rustix::thread::sched_getaffinity(Some(thread)).ok()?;
        let shared = (0..CpuSet::MAX_CPU).any(|cpu| here.is_set(cpu) && allowed.is_set(cpu));
        (allowed.count() > 1 && shared).then_some((here, allowed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much of a minute a pager yields that is starved whenever it has yielded for `between`, in `parts`.
    fn share_yielded(between: Duration, parts: u32) -> f64 {
        const WHOLE: Duration = Duration::from_secs(60);
        let start = Instant::now();
        let mut pauses = Pauses::default();
        let (mut now, mut yielded) = (start, Duration::ZERO);
        while now.duration_since(start) < WHOLE {
            for _ in 0..parts {
                pauses.yielded(between / parts);
            }
            yielded += between;
            now += between;
            pauses.starved(now);
            while pauses.lasts(now) {
                now += Duration::from_millis(1);
            }
        }
        yielded.as_secs_f64() / now.duration_since(start).as_secs_f64()
    }

    #[test]
    fn somebody_who_comes_by_now_and_then_does_not_keep_it_from_yielding() {
        for parts in [1, 10] {
            let share = share_yielded(Duration::from_millis(80), parts);
            assert!(share > 0.8, "{share}");
        }
    }

    #[test]
    fn it_hardly_yields_where_it_is_starved_each_time() {
        let share = share_yielded(Duration::from_millis(4), 1);
        assert!(share < 0.01, "{share}");
    }

    #[test]
    fn a_long_pause_is_forgotten_once_yielding_pays() {
        let now = Instant::now();
        let mut pauses = Pauses::default();
        for _ in 0..20 {
            pauses.starved(now);
        }
        assert!(pauses.lasts(now + PAUSE_MAX - PAUSE_MIN) && !pauses.lasts(now + PAUSE_MAX));
        pauses.yielded(PAYS_FROM);
        pauses.starved(now);
        assert!(pauses.lasts(now) && !pauses.lasts(now + PAUSE_MIN));
    }

    #[test]
    fn without_real_time_it_runs_at_ordinary_priority_and_has_its_own_back() {
        let policy = || {
            // SAFETY: sched_getscheduler(2) takes a number and changes nothing.
            unsafe { libc::sched_getscheduler(0) }
        };
        std::thread::spawn(move || {
            let ordinary = || without_real_time(policy) & !libc::SCHED_RESET_ON_FORK;
            assert_eq!(ordinary(), libc::SCHED_OTHER);
            let granted = be_real_time();
            let before = policy();
            assert_eq!(ordinary(), libc::SCHED_OTHER);
            assert_eq!((policy(), before == libc::SCHED_OTHER), (before, !granted));
        })
        .join()
        .unwrap();
    }
}
