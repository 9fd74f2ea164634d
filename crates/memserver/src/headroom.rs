//! Memory that the system would not give: a control group may leave less than the server has been told
//! to lend, because others in it use it or because its limit was lowered. Whoever touches memory beyond
//! the limit is killed, with all that it holds. So the server looks before it takes memory that it has
//! not had before.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use farmem_region::ByteCount;

/// What is left for tables, connections and pages that are being read, and for what the kernel charges
/// late.
const RESERVE_BYTES: u64 = 16 << 20;
/// So much may be taken before it is looked again, at most, and half of what there is above the reserve.
/// To look takes some tens of microseconds.
const LOOK_BYTES: u64 = 64 << 20;

type Look = dyn Fn() -> Option<ByteCount> + Send + Sync + 'static;

/// Says how much more memory this process may have; nothing if there is no limit.
#[derive(Clone)]
pub struct MemoryLeft(Arc<Look>);

impl MemoryLeft {
    /// Asks `look`, from any thread.
    pub fn new(look: impl Fn() -> Option<ByteCount> + Send + Sync + 'static) -> Self {
        Self(Arc::new(look))
    }

    /// What is left now.
    pub(crate) fn now(&self) -> Option<ByteCount> {
        (self.0)()
    }
}

impl fmt::Debug for MemoryLeft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryLeft")
    }
}

/// Whether memory may be taken.
#[derive(Debug)]
pub(crate) struct Headroom {
    left: Option<MemoryLeft>,
    /// Bytes that may be taken before it is looked again.
    credit: AtomicU64,
    is_short: AtomicBool,
}

impl Headroom {
    pub(crate) const fn new(left: Option<MemoryLeft>) -> Self {
        Self { left, credit: AtomicU64::new(0), is_short: AtomicBool::new(false) }
    }

    /// Whether it is looked at all.
    pub(crate) const fn is_limited(&self) -> bool {
        self.left.is_some()
    }

    /// Whether memory was refused the last time that it was looked.
    pub(crate) fn is_short(&self) -> bool {
        self.is_short.load(Ordering::Relaxed)
    }

    /// Takes so many bytes that were never had, if there are as many. Calls `short` with what is left when
    /// there no longer are.
    pub(crate) fn take(&self, bytes: u64, short: impl FnOnce(ByteCount)) -> bool {
        let Some(MemoryLeft(look)) = &self.left else {
            return true;
        };
        let spend = |credit: u64| credit.checked_sub(bytes);
        if self.credit.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).is_ok() {
            return true;
        }
        let left = look();
        let above = left.map_or(u64::MAX, |left| left.get().saturating_sub(RESERVE_BYTES));
        let was_short = self.is_short.swap(above < bytes, Ordering::Relaxed);
        if above < bytes {
            if !was_short {
                short(left.unwrap_or_default());
            }
            return false;
        }
        let credit = (above / 2).min(LOOK_BYTES);
        self.credit.store(credit.saturating_sub(bytes), Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn no_more_is_taken_than_is_left_above_the_reserve() {
        // What a group leaves: others take from it too.
        let left = Arc::new(Mutex::new(Some(ByteCount::new(RESERVE_BYTES + (200 << 20)))));
        let shared = Arc::clone(&left);
        let headroom = Headroom::new(Some(MemoryLeft::new(move || *shared.lock().unwrap())));
        let mut taken = 0_u64;
        let told = Mutex::new(Vec::new());
        let take = |bytes| headroom.take(bytes, |left| told.lock().unwrap().push(left));
        while take(2 << 20) {
            taken += 2 << 20;
            let mut left = left.lock().unwrap();
            *left = left.map(|left| ByteCount::new(left.get() - (2 << 20)));
        }
        assert!(headroom.is_short() && taken > 190 << 20 && taken <= 200 << 20, "{taken}");
        assert!(!take(2 << 20));
        assert_eq!(*told.lock().unwrap(), [left.lock().unwrap().unwrap()], "once is enough");
        *left.lock().unwrap() = None;
        assert!(take(1 << 30) && !headroom.is_short(), "no limit any more");
        *left.lock().unwrap() = Some(ByteCount::new(0));
        assert!((0..100).any(|_| !take(2 << 20)), "it is looked again");
        assert_eq!(told.lock().unwrap().len(), 2, "another time");
    }
}
