//! Shares of something that is limited, counted by whom they belong to.
//!
//! Owns the sums and nothing else; whoever holds no share leaves no trace.

use std::{hash::Hash, sync::Arc};

use dashmap::{DashMap, Entry};

/// The sums.
#[derive(Debug)]
pub(crate) struct Tally<K: Eq + Hash> {
    sums: DashMap<K, u64>,
}

/// A share; given back by its drop.
#[derive(Debug)]
pub(crate) struct Share<K: Copy + Eq + Hash> {
    tally: Arc<Tally<K>>,
    key: K,
    amount: u64,
}

impl<K: Eq + Hash> Default for Tally<K> {
    fn default() -> Self {
        Self { sums: DashMap::new() }
    }
}

impl<K: Copy + Eq + Hash> Tally<K> {
    /// So much for this one, if all of its shares are `limit` at most with it.
    pub fn take(self: &Arc<Self>, key: K, amount: u64, limit: u64) -> Option<Share<K>> {
        match self.sums.entry(key) {
            Entry::Occupied(sum) if *sum.get() + amount > limit => return None,
            Entry::Vacant(_) if amount > limit => return None,
            Entry::Occupied(mut sum) => *sum.get_mut() += amount,
            Entry::Vacant(sum) => drop(sum.insert(amount)),
        }
        Some(Share { tally: self.clone(), key, amount })
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }
}

impl<K: Copy + Eq + Hash> Drop for Share<K> {
    fn drop(&mut self) {
        if let Entry::Occupied(mut sum) = self.tally.sums.entry(self.key) {
            *sum.get_mut() -= self.amount;
            if *sum.get() == 0 {
                sum.remove();
            }
        }
    }
}
