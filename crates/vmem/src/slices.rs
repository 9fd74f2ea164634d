//! Short turns for a thread without real-time priority, so that it gets them soon when it wakes up.

/// How to be scheduled: the kernel's sched_attr in its first form.
#[repr(C)]
#[derive(Debug, Default)]
struct Scheduling {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const _: () = assert!(size_of::<Scheduling>() == 48);

/// The least that the kernel grants.
const SHORTEST_NANOS: u64 = 100_000;
const RESET_ON_FORK: u64 = 1;

/// Asks for the shortest turns (Linux 6.12; an older kernel takes no notice): of all threads of its
/// priority the calling one is then the first to run when it wakes up. Anybody may. `alone`: threads and
/// processes that it starts do not inherit it.
pub(crate) fn ask_for_short_ones(alone: bool) {
    let Some(mut own) = of_thread(0) else { return };
    own.flags |= if alone { RESET_ON_FORK } else { 0 };
    own.runtime = SHORTEST_NANOS;
    // SAFETY: sched_setattr(2) reads the structure, whose size it finds in it, and changes how the
    // calling thread is scheduled.
    let _ = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const own, 0) };
}

/// How a thread is scheduled, 0 for the calling one.
fn of_thread(thread: i32) -> Option<Scheduling> {
    let mut found = Scheduling::default();
    // SAFETY: sched_getattr(2) writes at most as many bytes as it is told that there are.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_getattr, thread, &raw mut found, size_of::<Scheduling>(), 0)
    };
    (result == 0).then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_turns_are_granted_to_anybody() {
        let before = of_thread(0).unwrap();
        if before.runtime == 0 {
            // A kernel that knows of no turns of one's own.
            return;
        }
        ask_for_short_ones(true);
        let after = of_thread(0).unwrap();
        assert_eq!((after.policy, after.nice), (before.policy, before.nice));
        assert_eq!(after.runtime, SHORTEST_NANOS);
    }
}
