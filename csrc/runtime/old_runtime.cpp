// What newer headers refer to and glibc 2.28 or gcc 8's libstdc++ lacks, made of what these have: for builds with
// G2RL_GLIBC.  Hidden, so that no other library sees it.
#include <exception>
#include <ios>
#include <new>
#include <string>

#define HERE(symbol) __asm__(symbol) __attribute__((visibility("hidden")))
#define OLDER(symbol) __asm__(symbol)
#define STREAM(kind, function) "_ZNSt7__cxx11" kind "IcSt11char_traitsIcESaIcEE" function

extern "C" {

// Whether the process has one thread: libstdc++ then counts references without atomic operations.  Zero: always with them.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// References to an exception, counted by others that count them. exception_ptr's own copy constructor and destructor would
// not do: newer headers make them of these two.
void refer_to(void** pointer, void* exception) OLDER("_ZNSt15__exception_ptr13exception_ptrC1EPv");
void destroy_nested(void* nested_exception) OLDER("_ZNSt16nested_exceptionD1Ev");
void add_reference(void** pointer) HERE("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
void drop_reference(void** pointer) HERE("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

void add_reference(void** pointer) {
  void* copy;
  refer_to(&copy, *pointer);  // never destroyed
}
void drop_reference(void** pointer) {
  void* nested_exception[] = {nullptr, *pointer};  // its table of virtual functions, its exception_ptr
  *pointer = nullptr;
  destroy_nested(nested_exception);
}

void throw_bad_array_new_length() HERE("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }

// Streams without the argument that had a default.
void open_output(void* stream, std::ios_base::openmode mode) OLDER(STREAM("19basic_ostringstream", "C1ESt13_Ios_Openmode"));
void open_both(void* stream, std::ios_base::openmode mode) OLDER(STREAM("18basic_stringstream", "C1ESt13_Ios_Openmode"));
void make_output(void* stream) HERE(STREAM("19basic_ostringstream", "C1Ev"));
void make_both(void* stream) HERE(STREAM("18basic_stringstream", "C1Ev"));

void make_output(void* stream) { open_output(stream, std::ios_base::out); }
void make_both(void* stream) { open_both(stream, std::ios_base::in | std::ios_base::out); }

}  // extern "C"

// C++20's two forms of str().
std::string text(const void* buffer) OLDER("_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string text_of_lvalue(const void* buffer) HERE("_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string text_of_rvalue(void* buffer) HERE("_ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");

std::string text_of_lvalue(const void* buffer) { return text(buffer); }
std::string text_of_rvalue(void* buffer) { return text(buffer); }  // a copy: the buffer is about to go
