//! Which request goes wrong, and how: decided from a seed, the same in the process and over HTTP.
//!
//! * A decision depends on the seed, the rule, the operation, the name and how often that pair was asked for, and on
//!   nothing else: threads may interleave as they like. (Bursts and limits count in the order of arrival.)
//! * Nothing here acts. [`crate::FaultyBucket`] and the HTTP face carry decisions out.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::time::Duration;

use parking_lot::Mutex;

use crate::ObjectName;

/// A kind of request, as a store bills it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Conditional and plain puts, and all requests of a multipart upload.
    Put,
    /// Whole and ranged gets.
    Get,
    /// Heads.
    Head,
    /// Pages of a listing; the name is the prefix.
    List,
    /// Deletes; the name is the first one of the batch.
    Delete,
}

impl Operation {
    /// The word that errors use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Put => "PUT",
            Self::Get => "GET",
            Self::Head => "HEAD",
            Self::List => "LIST",
            Self::Delete => "DELETE",
        }
    }
    fn writes(self) -> bool {
        matches!(self, Self::Put | Self::Delete)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What becomes of the request itself. For a read, `After` and `Late` are as `Before`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// It never reaches the store.
    Before,
    /// The store carries it out; only the answer goes wrong.
    After,
    /// The caller is answered now, and the store carries it out after this many further operations, or when the test
    /// says `land_late()`.
    Late(u32),
}

/// What the caller sees.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Effect {
    /// The right answer, but slowly: half of the waits are below `p50`, one in a hundred is at `p99`.
    Latency {
        /// Median.
        p50: Duration,
        /// What one in a hundred takes.
        p99: Duration,
    },
    /// An HTTP status, such as 500, 503, 429 or 409, for this request and the `burst` that the rule matches next.
    Status {
        /// The status.
        code: u16,
        /// How many further requests get it too.
        burst: u32,
    },
    /// The connection breaks.
    Reset,
    /// Fewer bytes than the object has.
    ShortBody,
    /// As many bytes as the object has, but not those.
    WrongBody,
    /// A listing as it was a few writes ago.
    StaleList,
    /// A listing with an entry twice.
    ListTwice,
    /// A status that promises success, and an error in the body. Only requests whose body the client reads get it; others
    /// get 500.
    ErrorInBody,
    /// Credentials that were good a moment ago are refused.
    ExpiredCredentials,
}

impl Effect {
    fn fits(self, operation: Operation) -> bool {
        match self {
            Self::ShortBody | Self::WrongBody => operation == Operation::Get,
            Self::StaleList | Self::ListTwice => operation == Operation::List,
            _ => true,
        }
    }
}

/// One way to go wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    /// Only this operation; `None`: each one that the effect fits.
    pub operation: Option<Operation>,
    /// Names it applies to; `*` stands for any characters, `/` included.
    pub names: String,
    /// From 0 to 1.
    pub probability: f64,
    /// What becomes of the request.
    pub when: When,
    /// What the caller sees.
    pub effect: Effect,
    /// How often it may strike; `None`: no limit.
    pub times: Option<u32>,
    /// How many requests that it would strike it lets pass before.
    pub spared: u64,
}

impl Rule {
    /// `effect` on every request for `names`, before the store sees it.
    pub fn new(names: &str, effect: Effect) -> Self {
        Self {
            operation: None,
            names: names.into(),
            probability: 1.0,
            when: When::Before,
            effect,
            times: None,
            spared: 0,
        }
    }
    /// The connection breaks after the store carried the write out.
    pub fn lost_answer(names: &str) -> Self {
        Self::new(names, Effect::Reset).on(Operation::Put).when(When::After)
    }
    /// A put whose caller is told that the connection broke, and which lands `operations` later.
    pub fn late_put(names: &str, operations: u32) -> Self {
        Self::new(names, Effect::Reset).on(Operation::Put).when(When::Late(operations))
    }
    /// The store does not answer at all, until the rules are changed.
    pub fn outage() -> Self {
        Self::new("*", Effect::Status { code: 503, burst: 0 })
    }
    /// Only this operation.
    pub fn on(mut self, operation: Operation) -> Self {
        self.operation = Some(operation);
        self
    }
    /// What becomes of the request.
    pub fn when(mut self, when: When) -> Self {
        self.when = when;
        self
    }
    /// Strikes one request in `1 / probability`.
    pub fn with_probability(mut self, probability: f64) -> Self {
        assert!((0.0..=1.0).contains(&probability), "{probability} is no probability");
        self.probability = probability;
        self
    }
    /// Strikes at most `times`.
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }
    /// Lets `requests` pass that it would strike.
    pub fn after(mut self, requests: u64) -> Self {
        self.spared = requests;
        self
    }

    /// Everything that a store may do without being wrong for ever, `share` of all requests in all: resets before and
    /// after the effect, errors of every sort, late puts, short bodies, repeated entries. No wrong bytes, no stale
    /// listings: those no store we support may answer.
    pub fn weather(share: f64) -> Vec<Self> {
        let error = |code| Self::new("*", Effect::Status { code, burst: 0 });
        let rules = [
            Self::new("*", Effect::Reset),
            Self::new("*", Effect::Reset).when(When::After),
            error(500),
            error(500).when(When::After),
            Self::new("*", Effect::Status { code: 503, burst: 2 }),
            error(429),
            Self::late_put("*", 20),
            Self::new("*", Effect::ErrorInBody).when(When::After),
            Self::new("*", Effect::ShortBody),
            Self::new("*", Effect::ListTwice),
        ];
        // About eight of them fit a write, a read or a listing.
        rules.into_iter().map(|rule| rule.with_probability(share / 8.0)).collect()
    }

    fn applies(&self, operation: Operation, name: &str) -> bool {
        self.operation.is_none_or(|only| only == operation)
            && self.effect.fits(operation)
            && (operation.writes() || !matches!(self.when, When::Late(_)))
            && glob(&self.names, name)
    }
}

/// What to do to one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Decision {
    /// Wait this long before anything else.
    pub wait: Duration,
    /// And then this happens; never [`Effect::Latency`].
    pub fault: Option<(When, Effect)>,
    /// A number that the seed chose, for what the effect leaves open.
    pub chance: u64,
}

/// One request, as the store saw it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Counts from 0 over all requests.
    pub number: u64,
    /// Its kind.
    pub operation: Operation,
    /// Object or prefix.
    pub name: ObjectName,
    /// What was done to it.
    pub decision: Decision,
}

/// The rules, the seed, and the log of what was asked for.
#[derive(Debug)]
pub struct Faults {
    seed: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<(Rule, RuleState)>,
    asked: HashMap<(Operation, ObjectName), u64>,
    requests: u64,
    log: VecDeque<Request>,
}

#[derive(Clone, Copy, Debug, Default)]
struct RuleState {
    spared: u64,
    struck: u32,
    burst: u32,
}

/// The log keeps this many of the newest requests.
const LOG_REQUESTS_MAX: usize = 100_000;

impl Faults {
    /// Rules are tried in order; the first failure that strikes is the one that happens, delays add up.
    pub fn new(seed: u64, rules: Vec<Rule>) -> Self {
        let faults = Self { seed, state: Mutex::default() };
        faults.set_rules(rules);
        faults
    }

    /// Replaces the rules; bursts and limits start anew.
    pub fn set_rules(&self, rules: Vec<Rule>) {
        self.state.lock().rules = rules.into_iter().map(|rule| (rule, RuleState::default())).collect();
    }

    /// Adds a rule in front of the others.
    pub fn add_rule(&self, rule: Rule) {
        self.state.lock().rules.insert(0, (rule, RuleState::default()));
    }

    /// What happens to the next request of `operation` for `name`. It is logged.
    pub fn decide(&self, operation: Operation, name: &ObjectName) -> Decision {
        let mut state = self.state.lock();
        let asked = state.asked.entry((operation, name.clone())).or_default();
        let asked_before = *asked;
        *asked += 1;
        let mut chance = Chance::new(self.seed, operation, name, asked_before);
        let mut decision = Decision { chance: chance.next(), ..Decision::default() };
        for (rule, state) in &mut state.rules {
            // Roll for every rule, so that one rule's burst does not change what the next rules do.
            let roll = chance.unit();
            let detail = chance.unit();
            if !rule.applies(operation, name.as_str()) || !state.strikes(rule, roll) {
                continue;
            }
            match rule.effect {
                Effect::Latency { p50, p99 } => decision.wait += latency(p50, p99, detail),
                effect if decision.fault.is_none() => decision.fault = Some((rule.when, effect)),
                _ => (),
            }
        }
        let number = state.requests;
        state.requests += 1;
        if state.log.len() == LOG_REQUESTS_MAX {
            state.log.pop_front();
        }
        state.log.push_back(Request { number, operation, name: name.clone(), decision });
        decision
    }

    /// Requests so far, tries included.
    pub fn requests(&self) -> u64 {
        self.state.lock().requests
    }

    /// The newest requests, oldest first.
    pub fn log(&self) -> Vec<Request> {
        self.state.lock().log.iter().cloned().collect()
    }
}

impl RuleState {
    fn strikes(&mut self, rule: &Rule, roll: f64) -> bool {
        if self.burst > 0 {
            self.burst -= 1;
            return true;
        }
        if roll >= rule.probability || rule.times.is_some_and(|times| self.struck >= times) {
            return false;
        }
        if self.spared < rule.spared {
            self.spared += 1;
            return false;
        }
        self.struck += 1;
        if let Effect::Status { burst, .. } = rule.effect {
            self.burst = burst;
        }
        true
    }
}

/// Log-normal through the two given points, never above `p99`.
fn latency(p50: Duration, p99: Duration, roll: f64) -> Duration {
    let ratio = p99.as_secs_f64().max(1e-9) / p50.as_secs_f64().max(1e-9);
    // The logistic curve stands in for the normal one: its inverse is one line. ln(99) is where it reaches 0.99.
    let deviation = (roll.clamp(1e-9, 0.99) / (1.0 - roll.clamp(1e-9, 0.99))).ln() / 99f64.ln();
    p50.mul_f64(ratio.powf(deviation)).min(p99)
}

/// A stream of numbers that only the seed and the request decide.
struct Chance(u64);

impl Chance {
    fn new(seed: u64, operation: Operation, name: &ObjectName, asked_before: u64) -> Self {
        let mut hash = mix(seed ^ 0x6369_7374_6572_6e00);
        for byte in operation.as_str().bytes().chain([0]).chain(name.as_str().bytes()) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        Self(mix(hash ^ mix(asked_before)))
    }
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
    /// From 0 to just below 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The finaliser of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Whether `text` is what `pattern` describes, where `*` stands for any characters.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ObjectName {
        ObjectName::from_listing(text)
    }

    #[test]
    fn a_star_stands_for_any_characters() {
        let cases = [
            ("*", "", true),
            ("*", "a/b", true),
            ("main/*", "main/epoch/1", true),
            ("main/*", "branch/main/1", false),
            ("*/edit-*", "main/manifest/edit-1", true),
            ("*/edit-*", "main/manifest/base-1", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a*b*a", "abba", true),
            ("a", "ab", false),
        ];
        for (pattern, text, matches) in cases {
            assert_eq!(glob(pattern, text), matches, "{pattern} on {text}");
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_decisions_whatever_the_order_of_the_requests() {
        let names: Vec<_> = (0..200).map(|i| name(&format!("main/sst/{i}"))).collect();
        let decide = |seed, names: &mut dyn Iterator<Item = &ObjectName>| {
            let faults = Faults::new(seed, vec![Rule::new("*", Effect::Reset).with_probability(0.3)]);
            let mut decisions: Vec<_> =
                names.map(|name| (name.clone(), faults.decide(Operation::Put, name))).collect();
            decisions.sort_by(|a, b| a.0.cmp(&b.0));
            decisions
        };
        let forward = decide(7, &mut names.iter());
        assert_eq!(forward, decide(7, &mut names.iter().rev()));
        assert_ne!(forward, decide(8, &mut names.iter()));
        let struck = forward.iter().filter(|(_, decision)| decision.fault.is_some()).count();
        assert!((35..=85).contains(&struck), "{struck} of 200 at 30 %");
    }

    #[test]
    fn a_burst_strikes_again_and_a_limit_ends_it() {
        let rule = Rule::new("*", Effect::Status { code: 503, burst: 2 }).times(1);
        let faults = Faults::new(1, vec![rule]);
        let failed: Vec<bool> =
            (0..5).map(|_| faults.decide(Operation::Get, &name("a")).fault.is_some()).collect();
        assert_eq!(failed, [true, true, true, false, false]);
    }

    #[test]
    fn half_of_the_waits_are_below_the_median_and_none_above_p99() {
        let (p50, p99) = (Duration::from_millis(30), Duration::from_secs(2));
        let faults = Faults::new(5, vec![Rule::new("*", Effect::Latency { p50, p99 })]);
        let waits: Vec<_> = (0..2000).map(|_| faults.decide(Operation::Get, &name("a")).wait).collect();
        let below = waits.iter().filter(|wait| **wait < p50).count();
        assert!((900..=1100).contains(&below), "{below} of 2000 below the median");
        assert!(waits.iter().all(|wait| *wait <= p99));
        assert!(waits.iter().any(|wait| *wait > Duration::from_secs(1)));
    }

    #[test]
    fn a_rule_strikes_after_so_many_that_it_fits() {
        let rule = Rule::new("a", Effect::Reset).on(Operation::Put).after(2).times(1);
        let faults = Faults::new(1, vec![rule]);
        let strikes = |operation, of: &str| faults.decide(operation, &name(of)).fault.is_some();
        assert!(!strikes(Operation::Put, "b") && !strikes(Operation::Get, "a"), "it does not fit them");
        let struck = [(); 5].map(|()| strikes(Operation::Put, "a"));
        assert_eq!(struck, [false, false, true, false, false]);
    }

    #[test]
    fn body_faults_strike_gets_only_and_late_landing_strikes_writes_only() {
        let faults = Faults::new(1, vec![Rule::new("*", Effect::ShortBody)]);
        assert_eq!(faults.decide(Operation::Put, &name("a")).fault, None);
        assert!(faults.decide(Operation::Get, &name("a")).fault.is_some());
        faults.set_rules(vec![Rule::new("*", Effect::Reset).when(When::Late(3))]);
        assert_eq!(faults.decide(Operation::Get, &name("a")).fault, None);
        assert!(faults.decide(Operation::Delete, &name("a")).fault.is_some());
    }
}
