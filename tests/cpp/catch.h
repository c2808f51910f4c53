// The test framework, Catch2 3 or 2.13 (Debian 12), whichever is installed: tests include this and neither by name.
//
// Where the two differ, Catch::Matchers::ContainsSubstring is the name to use (2.13 calls it Contains).
#pragma once

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>

namespace Catch::Matchers {
inline auto ContainsSubstring(const std::string& text, CaseSensitive::Choice choice = CaseSensitive::Yes) {
    return Contains(text, choice);
}
}  // namespace Catch::Matchers
#endif
