//! The turnstile at the border: errors and panics become codes, their text waits for whoever asks.
//!
//! * No panic crosses: unwinding into C++ is undefined.
//! * The text is that of this thread's last refusal; the server asks for it in the thread that was refused.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tables::Result;

use crate::codes;
use crate::log::{Level, write};

thread_local! {
    static MESSAGE: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs `f`; 0 if it went well, else the server's code.
#[inline]
pub fn guard(f: impl FnOnce() -> Result<()>) -> i32 {
    code(0, || f().map(|()| 0))
}

/// Runs `f`; 0 for true, `otherwise` for false, else the server's code.
#[inline]
pub fn guard_found(otherwise: i32, f: impl FnOnce() -> Result<bool>) -> i32 {
    code(0, || f().map(|found| if found { 0 } else { otherwise }))
}

#[inline]
fn code(_ok: i32, f: impl FnOnce() -> Result<i32>) -> i32 {
    // A panic may leave the handles that `f` uses half changed. They hold no invariant that memory safety rests on, the statement
    // fails, and the server closes them.
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => refuse(codes::code_of(&error), codes::text_of(&error)),
        Err(panic) => refuse(codes::PANIC, panicked(&panic)),
    }
}

/// Runs `f`, which can not fail; `fallback` if it panicked.
#[inline]
pub fn guard_value<T>(fallback: T, f: impl FnOnce() -> T) -> T {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(value) => value,
        Err(panic) => {
            refuse(codes::PANIC, panicked(&panic));
            fallback
        }
    }
}

#[cold]
fn refuse(code: i32, message: String) -> i32 {
    MESSAGE.with_borrow_mut(|kept| *kept = message);
    code
}

#[cold]
fn panicked(panic: &Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    let message = format!("internal error, please report it: {text}");
    write(Level::Error, &message);
    message
}

/// The text of this thread's last refusal, where it stays until the next one.
pub fn last_message() -> (*const u8, usize) {
    MESSAGE.with_borrow(|kept| (kept.as_ptr(), kept.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_code_and_its_text_can_be_asked_for() {
        assert_eq!(guard(|| panic!("the roof is on fire")), codes::PANIC);
        MESSAGE.with_borrow(|kept| assert!(kept.contains("the roof is on fire"), "{kept}"));
        assert_eq!(guard_value(7, || panic!("again")), 7);
    }

    #[test]
    fn not_found_is_the_code_that_the_call_asks_for() {
        assert_eq!(guard_found(codes::END_OF_FILE, || Ok(false)), codes::END_OF_FILE);
        assert_eq!(guard_found(codes::END_OF_FILE, || Ok(true)), 0);
    }
}
