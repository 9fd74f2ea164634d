//! How the local limit of a run is divided among the processes that have a pager.
//!
//! Equal shares: simple, and the sum is never above the limit. A process without a pager is
//! below three quarters of the limit and has no share.

use std::collections::BTreeMap;

/// Divides a limit among members, which come and go.
#[derive(Debug)]
pub struct Budget<Member> {
    limit_bytes: u64,
    /// Each member's share, as last announced.
    shares: BTreeMap<Member, u64>,
}

impl<Member: Copy + Ord> Budget<Member> {
    /// A budget nobody has a share of yet.
    #[must_use]
    pub const fn new(limit_bytes: u64) -> Self {
        Self { limit_bytes, shares: BTreeMap::new() }
    }

    /// Takes in a member.
    pub fn join(&mut self, member: Member) {
        self.shares.insert(member, 0);
    }

    /// Lets a member go.
    pub fn leave(&mut self, member: Member) {
        self.shares.remove(&member);
    }

    /// The members whose share is no longer what they were told, with the new one. Those who lose
    /// come first, so that the sum of what is announced never exceeds the limit.
    pub fn changes(&mut self) -> Vec<(Member, u64)> {
        let share = self.share();
        let mut changes: Vec<_> = self
            .shares
            .iter()
            .filter(|&(_, &told)| told != share)
            .map(|(&member, &told)| (told, member))
            .collect();
        changes.sort_unstable_by(|a, b| b.cmp(a));
        self.shares.values_mut().for_each(|told| *told = share);
        changes.into_iter().map(|(_, member)| (member, share)).collect()
    }

    /// The limit of the whole run.
    #[must_use]
    pub const fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    fn share(&self) -> u64 {
        self.limit_bytes / u64::try_from(self.shares.len().max(1)).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_loses_before_the_second_gains() {
        let mut budget = Budget::new(100);
        budget.join('a');
        assert_eq!(budget.changes(), [('a', 100)]);
        budget.join('b');
        assert_eq!(budget.changes(), [('a', 50), ('b', 50)]);
        assert_eq!(budget.changes(), []);
        budget.leave('a');
        assert_eq!(budget.changes(), [('b', 100)]);
    }

    proptest! {
        #[test]
        fn whatever_happens_what_members_were_told_never_exceeds_the_limit(
            limit in 1_u64..1 << 50,
            steps in prop::collection::vec((any::<bool>(), 0_u8..20), 1..100),
        ) {
            let mut budget = Budget::new(limit);
            let mut told = BTreeMap::new();
            for (joins, member) in steps {
                if joins {
                    budget.join(member);
                } else {
                    budget.leave(member);
                }
                if !joins || told.contains_key(&member) {
                    told.remove(&member);
                }
                for (member, share) in budget.changes() {
                    told.insert(member, share);
                    prop_assert!(told.values().sum::<u64>() <= limit);
                }
            }
        }
    }
}
