//! Who writes and syncs the next group, and how the others sleep meanwhile.
//!
//! * One leads at a time. Who waits for the leader's group is woken when it ends, all by one system call; of those who wait for the next
//!   group one is woken, to lead it. A condition variable would wake them one after the other, each through its mutex: that was
//!   2.7 futex calls a commit with eight threads.
//! * Groups are numbered, and two words to sleep on are enough: nobody waits for a group after the next.

use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use rustix::thread::futex;

pub(super) struct Turns {
    lead: Mutex<Lead>,
    /// Changes when a group with an even number, or an odd one, ends or may begin.
    words: [AtomicU32; 2],
}

struct Lead {
    leading: bool,
    /// Whether somebody may sleep on the word of that number: a commit alone wakes nobody.
    sleepers: [bool; 2],
    /// The last group that was taken, and where it ends.
    group: u32,
    taken: u64,
}

/// The leader's token; dropping it ends the turn.
pub(super) struct Leader<'a> {
    turns: &'a Turns,
    /// Nobody will lead again: all are woken.
    pub(super) last: bool,
}

impl Turns {
    pub(super) fn new(start: u64) -> Self {
        Self {
            lead: Mutex::new(Lead { leading: false, sleepers: [false; 2], group: 0, taken: start }),
            words: [AtomicU32::new(0), AtomicU32::new(0)],
        }
    }

    /// Leads, if nobody does. Else sleeps until that may have changed, or the group that `end` is in may be durable. `done` is asked first,
    /// with nobody ending a turn meanwhile.
    pub(super) fn lead_or_sleep(&self, end: u64, done: impl FnOnce() -> bool) -> Option<Leader<'_>> {
        let mut lead = self.lead.lock();
        if done() {
            return None;
        }
        if !lead.leading {
            lead.leading = true;
            return Some(Leader { turns: self, last: false });
        }
        let number = word_of(if end <= lead.taken { lead.group } else { lead.group.wrapping_add(1) });
        let word = &self.words[number];
        let seen = word.load(Ordering::Acquire);
        lead.sleepers[number] = true;
        drop(lead);
        // Whether it slept, was interrupted or found another value: the caller looks again.
        _ = futex::wait(word, futex::Flags::PRIVATE, seen, None);
        None
    }
}

/// The number of the word that they sleep on who wait for `group`.
fn word_of(group: u32) -> usize {
    group as usize % 2
}

impl Leader<'_> {
    /// The leader's group is everything below `end`.
    pub(super) fn takes(&self, end: u64) {
        let mut lead = self.turns.lead.lock();
        lead.group = lead.group.wrapping_add(1);
        lead.taken = end;
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let mut lead = self.turns.lead.lock();
        lead.leading = false;
        let (this, next) = (word_of(lead.group), word_of(lead.group.wrapping_add(1)));
        let [of_this, of_next] = [this, next].map(|number| {
            self.turns.words[number].fetch_add(1, Ordering::Release);
            lead.sleepers[number]
        });
        lead.sleepers[this] = false;
        drop(lead);
        // The disk is idle until the heir is awake, so it comes first. A wake can only fail for an address that is not ours.
        let heirs = if self.last || std::thread::panicking() { i32::MAX as u32 } else { 1 };
        for (number, sleep, woken) in [(next, of_next, heirs), (this, of_this, i32::MAX as u32)] {
            if sleep {
                _ = futex::wake(&self.turns.words[number], futex::Flags::PRIVATE, woken);
            }
        }
    }
}
