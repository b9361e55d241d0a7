@echo off
rem Downloads the weights of Wan2.2-T2V-A14B. A double click will do; arguments go to "wanflow download".
setlocal DisableDelayedExpansion
set "HERE=%~dp0"
set "CODE=1"

rem The project's own environment first, then python, then the launcher that python.org installs.
set "PYTHON=%HERE%.venv\Scripts\python.exe"
if exist "%PYTHON%" goto check
set "PYTHON=python"
call :new_enough
if not errorlevel 1 goto run
set "PYTHON=py"

:check
call :new_enough
if not errorlevel 1 goto run
echo Python 3.11 or newer was not found.
echo Get it from https://www.python.org/downloads/ and tick "Add python.exe to PATH". Then start this again.
goto done

:run
"%PYTHON%" "%HERE%download_T2V_A14B_weights.py" %*
set "CODE=%ERRORLEVEL%"
if not "%CODE%"=="0" echo Not finished, code %CODE%. Start it again to go on where it stopped.

:done
rem Keep open the window of a double click, which runs "cmd /c"; a command prompt stays anyway.
setlocal EnableDelayedExpansion
set "LINE=!CMDCMDLINE!"
if not "!LINE:/c=!"=="!LINE!" pause
exit /b %CODE%

:new_enough
"%PYTHON%" -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul
exit /b %ERRORLEVEL%
